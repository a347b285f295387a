"""Tile encoders, which map pixels to features."""
