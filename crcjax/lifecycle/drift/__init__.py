"""Drift of inputs and outputs, and performance without labels, by sequential tests (docs/lifecycle.md)."""
