"""Training of a model, in this process or in several."""
