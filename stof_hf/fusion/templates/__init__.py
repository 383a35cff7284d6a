"""Fused kernels, one family a file: its search space, defaults, limits and one function."""
