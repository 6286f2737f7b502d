"""From instructions to the regression set: sources, prompts, sampling, Rouge-L, and the published Parquet."""
