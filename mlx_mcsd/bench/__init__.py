"""Benchmarks that check what they time: no figure is printed for a wrong result."""
