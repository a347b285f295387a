"""Logs and metrics of a run while it trains."""
