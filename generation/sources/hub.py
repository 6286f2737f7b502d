"""Raw rows of a Hugging Face dataset, streamed by name at a pinned commit or from a local folder. Imports no Ray.

A local folder is in hub layout, or was written by `save_to_disk`. Rows come unchanged from the dataset; class labels are numbers. The
`datasets` library rejects a dataset that needs its own code.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from cluster.config import HubSource
from cluster.errors import UsageError, first_line
from generation.sources.row import encodable
from generation.sources.values import Cells


def read_rows(source: HubSource, columns: Container[str] | None = None) -> Iterator[tuple[str, Any]]:
    """Yield `(location, row)` of the split of the source; a location is `name/split:number`, counted from 1.

    Args:
        source: the dataset.
        columns: the columns to read, if the dataset lists its columns and has one of them; None reads all columns.

    Raises `UsageError` for a name without a pinned commit and for a dataset that cannot be opened or read.
    """
    folder = Path(source.name).expanduser()
    if not folder.is_dir() and source.revision is None:
        raise UsageError(
            f"source.name={source.name} is not a local folder, so source.revision must pin a commit of the dataset; "
            f"copy its 40 hex digits from the dataset's page under Files, History"
        )
    try:
        opened = _open_saved(folder, source.split) if _is_saved(folder) else _open(source, folder)
        if columns is not None and (needed := [name for name in opened.features or () if name in columns]):
            opened = opened.select_columns(needed)
        # The library reads a CSV file with pandas; its list columns are texts.
        is_csv = opened.info.builder_name == "csv"
        for number, row in enumerate(opened, 1):
            yield f"{source.name}/{source.split}:{number}", Cells(row) if is_csv else row
    except Exception as error:
        # The library raises a different class for each cause: no network, unknown name, subset or split, damaged file.
        raise UsageError(
            f"source.name={source.name} cannot be read: {encodable(first_line(error))}; "
            f"check name, subset, data_dir, split, revision and network"
        ) from None


def _open(source: HubSource, folder: Path) -> Any:
    import datasets

    local = folder.is_dir()
    return datasets.load_dataset(
        str(folder) if local else source.name,
        source.subset,
        data_dir=source.data_dir,
        split=source.split,
        revision=None if local else source.revision,
        streaming=True,
    )


def _is_saved(folder: Path) -> bool:
    """Return whether `save_to_disk` of the `datasets` library wrote a folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _open_saved(folder: Path, split: str) -> Any:
    import datasets

    saved = datasets.load_from_disk(str(folder))
    return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
