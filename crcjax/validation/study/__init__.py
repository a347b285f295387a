"""A study: the analysis plan, its lock, the trial's data, the sections of the analysis, gates, results and the report."""
