"""Plans made from a few uncached runs: which steps to compute, and how to make the others from them."""
