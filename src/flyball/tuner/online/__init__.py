"""Proposers for a live service: cheap, bounded in memory, and able to forget."""
