"""Trainings: what one consists of, in this process or in several."""
