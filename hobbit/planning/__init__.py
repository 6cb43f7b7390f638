"""Whether a model runs here, how fast, and why it was not faster: without loading it."""
