"""The tile store on disk."""
