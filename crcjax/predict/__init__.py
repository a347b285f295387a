"""A trained run and slide files to predictions and heatmaps."""
