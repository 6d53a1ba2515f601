"""Metrics in, fleet plan out: problem, calibration, sizing, solvers."""
