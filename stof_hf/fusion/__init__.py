"""Fused kernels for what lies around attention, and the schemes that say where they begin."""
