"""Where the time of a pipeline goes: timings, traces for Perfetto, ranges for Nsight Systems."""
