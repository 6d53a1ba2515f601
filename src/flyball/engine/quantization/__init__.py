"""Weights in fewer bits: quantisers, the layer that holds them, the walk over a model, files, calibration."""
