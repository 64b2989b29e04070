"""Small random models, real layer shapes: what tests, the demo and benchmarks share."""
