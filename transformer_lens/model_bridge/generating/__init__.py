"""Generation with hooks: options, the run, and its stream."""
