"""Slide files to tile stores."""
