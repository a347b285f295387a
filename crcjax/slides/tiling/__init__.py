"""Tissue segmentation, quality control, tile plans and reading of regions."""
