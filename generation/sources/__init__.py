"""Instruction sources: files, hub datasets and BIG-bench become checked instruction rows. Imports no Ray.

- `row`: the checked row, the dead letter and the check of one row.
- `files` and `hub`: read raw rows.
- `formats`: converts a raw row of a public format to the columns of this project.
- `bigbench`: reads and renders BIG-bench tasks.
- `promptsource`: applies PromptSource templates to raw rows.
- `split`: assigns an example to train or validation.
- `mixture`: combines several sources.
- `decontaminate`: finds overlap with evaluation rows.
"""
