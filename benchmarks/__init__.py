"""One driver per question; `python -m benchmarks.<driver> --help`."""
