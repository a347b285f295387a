"""Predictions and a cohort to statistics, figures and a report."""
