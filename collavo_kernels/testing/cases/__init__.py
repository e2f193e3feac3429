"""The table of cases of every operator: forward, gradients, ``opcheck``, compile and benchmarks."""
