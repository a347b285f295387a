"""A simulated trial with known truth: every section of the report in one command, and a test of every estimator."""
