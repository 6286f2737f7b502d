"""Raw rows of a Hugging Face dataset, streamed by name at a pinned commit or from a local folder in hub layout. Imports no Ray.

Rows come unchanged from the dataset; class labels are numbers. The `datasets` library rejects a dataset that needs its own code.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.config import HubSource
from cluster.errors import UsageError, first_line


def read_rows(source: HubSource) -> Iterator[tuple[str, Any]]:
    """Yield `(location, row)` of the split of the source; a location is `name/split:number`, counted from 1.

    Raises `UsageError` for a name without a pinned commit and for a dataset that cannot be opened or read.
    """
    local = Path(source.name).expanduser().is_dir()
    if not local and source.revision is None:
        raise UsageError(
            f"source.name={source.name} is not a local folder, so source.revision must pin a commit of the dataset; "
            f"copy its 40 hex digits from the dataset's page under Files, History"
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
        # The library raises a different class for each cause: no network, unknown name, subset or split, damaged file.
        raise UsageError(
            f"source.name={source.name} cannot be read: {first_line(error)}; check name, subset, data_dir, split, revision and network"
        ) from None
