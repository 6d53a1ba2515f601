"""The outside world, real and simulated, behind the ports of the core."""
