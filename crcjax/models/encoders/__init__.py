"""Tile encoders: pixels to features."""
