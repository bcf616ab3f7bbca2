"""The stages of a run: one module each, which ``stage`` lists, and what they share."""
