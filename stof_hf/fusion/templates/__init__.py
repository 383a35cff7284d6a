"""Triton templates, one kernel family a file; each says what it computes and what can be tuned."""
