"""Synthetic slides painted with known ground truth."""
