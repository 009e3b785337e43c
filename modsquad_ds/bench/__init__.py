"""Benchmarks: what the parts cost, each as a ratio against its peers in the same run. Called by cli_bench.py."""
