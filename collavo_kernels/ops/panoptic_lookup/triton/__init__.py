"""The lookup in Triton, for NVIDIA and AMD: ``launch`` is the backend."""
