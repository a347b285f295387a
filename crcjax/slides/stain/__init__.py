"""Stain estimation and normalisation; the only sub-room of slides that uses JAX."""
