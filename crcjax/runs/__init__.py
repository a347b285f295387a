"""Run directories, checkpoints and files of weights."""
