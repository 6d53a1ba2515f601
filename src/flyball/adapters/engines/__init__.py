"""Engines that can be tuned, each behind `core.ports.Target`."""
