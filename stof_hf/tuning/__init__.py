"""The search for fused kernels and parameters, and the cache that keeps what it found."""
