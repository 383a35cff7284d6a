"""What lies around attention: layers as sequences of operators, fused by templates."""
