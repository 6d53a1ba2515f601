"""How one replica behaves: latency laws, queueing models, percentiles. No I/O."""
