"""Sources: from files, hub datasets and BIG-bench to checked instruction rows. One file an idea.

`row` what a usable row is, `files` and `hub` raw rows, `formats` from a raw row to rows of our own, `promptsource` templates over
raw rows, `split` the side an example falls on, `mixture` several sources as one, `decontaminate` overlap with evaluation rows.
"""
