"""One description of a training job, and the files of each scheduler that are rendered from it."""
