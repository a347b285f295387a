"""Running a function over many slides: worker processes or Ray."""
