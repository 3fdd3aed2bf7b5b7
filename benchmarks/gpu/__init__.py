"""Times of models of real size on a GPU: `python -m benchmarks.gpu`."""
