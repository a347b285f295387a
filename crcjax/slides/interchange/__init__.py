"""Tiles and features of CLAM, TRIDENT, STAMP and QuPath."""
