"""Benchmarks: what a cache saves and what it costs, beside the peers and beside simply taking fewer steps."""
