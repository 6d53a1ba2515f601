"""Metrics in, engine configuration out: the study loop, its objective and its report."""
