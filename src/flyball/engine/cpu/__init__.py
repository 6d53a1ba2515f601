"""Compiled CPU kernels: a whole decoder step in one call, where the machine has a compiler and AVX512-BF16."""
