"""The 4-bit linear operator in Triton, for NVIDIA and AMD: ``launch`` is the backend."""
