"""The mesh, the step, the loop and its checkpoints."""
