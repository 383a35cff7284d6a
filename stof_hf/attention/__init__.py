"""Scaled dot-product attention under a SparseMask: the op, its oracle and its backends."""
