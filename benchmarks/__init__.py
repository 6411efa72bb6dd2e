"""Benchmarks: speed as ratios, and the model and operator suites."""
