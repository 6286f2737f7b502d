"""The regression set: instruction sources, prompts, sampling, labels, and the published Parquet files."""
