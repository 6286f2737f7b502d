"""Speed and quality against named baselines, in one run: `python -m benchmarks.NAME --json -`."""
