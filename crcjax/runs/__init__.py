"""What a run directory and a checkpoint are."""
