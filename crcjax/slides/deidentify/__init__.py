"""Copies of slides without identifiers."""
