"""Attention with the crayon in Triton, for NVIDIA and AMD: ``launch`` is the backend."""
