"""What the scorer is worth: its picks against greedy, sampling, self-scores and the oracle."""
