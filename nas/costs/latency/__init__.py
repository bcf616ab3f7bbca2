"""Latency on this device: timing, the calibration of a predictor, its statistics and its predictions."""
