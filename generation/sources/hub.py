"""Raw rows of a Hugging Face dataset, streamed: by name at a pinned commit, or a local folder in hub layout.

The rows are the dataset's own, class labels as numbers. Datasets that need code of their own are refused by the library.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.config import HubSource
from cluster.errors import UsageError


def read_rows(source: HubSource) -> Iterator[tuple[str, Any]]:
    """Yield `(place, row)` of the source's split.

    Raises `UsageError` for a name without a pinned commit and for a dataset that cannot be opened or read.
    """
    local = Path(source.name).expanduser().is_dir()
    if not local and source.revision is None:
        raise UsageError(
            f"source.name={source.name} is no local folder, so source.revision must pin the dataset's commit (40 hex digits, "
            f"shown on its page under Files, History)"
        )
    import datasets

    try:
        opened = datasets.load_dataset(
            str(Path(source.name).expanduser()) if local else source.name,
            source.subset,
            data_dir=source.data_dir,
            split=source.split,
            revision=None if local else source.revision,
            streaming=True,
        )
        for number, row in enumerate(opened, 1):
            yield f"{source.name}/{source.split}:{number}", row
    except Exception as error:
        # The library raises a different class for each of: no network, no such name, subset or split, a damaged file.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"source.name={source.name} cannot be read: {reason}; check name, subset, data_dir, split, revision and network"
        ) from None
