"""gossamer: PyTorch networks made sparse while they train."""
