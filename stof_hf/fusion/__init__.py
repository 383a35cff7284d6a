"""What lies around attention, fused: operator sequences, templates, and modules made of them."""
