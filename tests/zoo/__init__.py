"""Well-known architectures at tiny widths: what is pruned of each, and that each still computes and trains."""
