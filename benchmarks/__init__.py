"""The harness that compares the scripts: `python -m benchmarks --help`."""
