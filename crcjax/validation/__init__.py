"""Compares predictions with the reference subtypes of a cohort: statistics, figures and a report."""
