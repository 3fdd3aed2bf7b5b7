"""While a pipeline runs: probes in front of its parts, clocks, ranges, and the profilers that trace some of them."""
