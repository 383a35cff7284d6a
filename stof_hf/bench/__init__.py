"""Benchmarks: every contestant on identical inputs and masks, in one process."""
