"""Evaluation of a scorer: its picks compared with greedy decoding, sampling, self-scores and the oracle."""
