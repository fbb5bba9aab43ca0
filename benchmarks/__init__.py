"""Speed benchmarks, and the PyTorch peer that they and the tests compare with."""
