"""Stores and a cohort to sharded device arrays."""
