"""A whole model's forward as CUDA graphs, so that small shapes do not wait for the host."""
