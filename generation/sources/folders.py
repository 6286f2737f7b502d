"""Find the data files of a path, and read the split and the partition columns in their names. Opens no file; imports no Ray.

Within a folder or a glob, hidden and temporary files, and files of other formats, are skipped. The names of skipped files are returned,
so that the reader can log them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from urllib.parse import unquote

from cluster import storage
from cluster.errors import UsageError

SUFFIXES = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".jsonlines": "lines",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
"""Format of a file by the end of its name, in any case."""
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".zstd": "zstd", ".lz4": "lz4"}
"""Compression of a text file by the end of its name, in any case."""
# Descriptions beside the data of a saved or published dataset.
_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "development"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "validation"),
}
_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
_NAMES_IN_A_NOTE = 5


@dataclass(frozen=True)
class DataFile:
    """A data file of a source."""

    uri: str
    dataset: str
    """Dataset of the rows that name no dataset."""
    split: str | None = None
    """Split of its rows by the name of the file; None if the name does not decide."""
    columns: Mapping[str, str | None] = field(default_factory=dict)
    """Columns in the folder names: `lang=en/part-0.parquet` gives `lang`."""


@dataclass(frozen=True)
class DataFiles:
    """The data files of a path, sorted, and the names of the files that are not read, with the reason."""

    files: list[DataFile]
    hidden: list[str]
    unsupported: list[str]

    def notes(self, setting: str) -> list[str]:
        """Return log lines for skipped files and for splits that file names decide."""
        found = [
            f"{setting}: skipped {len(names):,} {reason}: {_shorten(names)}"
            for reason, names in (("hidden or temporary files", self.hidden), ("files that are not data files", self.unsupported))
            if names
        ]
        named = [file for file in self.files if file.split]
        if named:
            sides = [
                f"{_shorten([_name(file.uri) for file in named if file.split == split])} in {split}" for split in ("train", "validation")
            ]
            found.append(f"{setting}: the file names decide the split: {'; '.join(side for side in sides if not side.startswith(' '))}")
        return found


def file_format(name: str) -> tuple[str | None, str | None]:
    """Return the format and the compression of a file name; the format is None for other files."""
    path = PurePosixPath(name.lower())
    compression = COMPRESSIONS.get(path.suffix)
    return SUFFIXES.get(PurePosixPath(path.stem).suffix if compression else path.suffix), compression


def find(path: str, setting: str = "source.path") -> DataFiles:
    """Return the data files of a file path, a folder or a glob, local or s3://.

    A path that exists is taken literally, also with `[`, `*` or `?` in it. Raises `UsageError` if no data file exists.
    """
    storage.check_uri(path, setting)
    root, pattern = storage.split_glob(path)
    try:
        if not pattern:
            names = [""] if storage.is_file(root) else list(storage.list_files(root))
        else:
            names = [uri.removeprefix(root).lstrip("/") for uri in storage.glob(path)]
    except UnicodeError:
        raise UsageError(f"{setting}={path}: a file name there is not UTF-8; rename that file") from None
    if names == [""]:
        names = [""] if file_format(root)[0] else []
        return _check(DataFiles([DataFile(root, _stem(root)) for _ in names], [], []), path, setting)
    hidden = [name for name in names if _is_hidden(name, pattern)]
    rest = [name for name in names if name not in set(hidden)]
    other = [name for name in rest if not file_format(name)[0] or _name(name) in _METADATA or _is_cache_of_dataset(name)]
    data = [name for name in rest if name not in set(other)]
    return _check(DataFiles(_described(root, data, is_folder=not pattern), hidden, other), path, setting)


def _check(found: DataFiles, path: str, setting: str) -> DataFiles:
    if not found.files:
        skipped = "".join(f"; {note.split(': ', 1)[1]}" for note in found.notes(setting))
        raise UsageError(
            f"{setting}={path}: found no .jsonl, .ndjson, .json, .csv, .parquet (or .gz) file, and no .tsv, .arrow, .bz2, .zst or .lz4 file"
            f"{skipped}; give a file, a folder or a glob"
        )
    return found


def _is_hidden(name: str, pattern: str) -> bool:
    """Return whether a part of a relative path is hidden or temporary, and the glob does not name such parts itself."""
    marks = ("_", ".")
    if any(part.startswith(marks) for part in pattern.split("/")):
        return False
    return any(part.startswith(marks) and "=" not in part for part in name.split("/"))


def _is_cache_of_dataset(name: str) -> bool:
    """Return whether a file is a cache of the `datasets` library, which holds the rows of another file again."""
    return _name(name).startswith("cache-") and name.endswith(".arrow")


def _described(root: str, names: Sequence[str], is_folder: bool) -> list[DataFile]:
    """Return the files with dataset, split and partition columns.

    File names decide the split only if they differ in it, or if all are evaluation files of a folder. Otherwise a source of one file,
    e.g. `train.jsonl`, would have no validation rows.
    """
    splits = {name: split_of_name(name) for name in names}
    kinds = set(splits.values())
    decide = len(kinds) > 1 or (is_folder and kinds == {"validation"})
    found = []
    for name in sorted(names):
        split = splits[name] if decide else None
        dataset = _name(root) if split else _stem(name)
        found.append(DataFile(storage.join(root, name), dataset or _stem(name), split, partition_columns(name)))
    return found


def split_of_name(name: str) -> str | None:
    """Return the split that a relative path names, e.g. `data/test-00000-of-00001.parquet`, or None.

    The words of evaluation files (validation, dev, test and others) give validation, so that their rows are never trained on.
    """
    for part in reversed(name.split("/")):
        if "=" in part:
            continue
        found = {_SPLIT_WORDS[word] for word in re.split(r"[^a-z]+", part.lower()) if word in _SPLIT_WORDS}
        if found:
            return "validation" if "validation" in found else "train"
    return None


def split_of_word(word: str) -> str | None:
    """Return the split for a word such as `train`, `dev` or `test`; None for other words."""
    return _SPLIT_WORDS.get(word.strip().lower())


def partition_columns(name: str) -> dict[str, str | None]:
    """Return the columns in the folder names of a relative path (Hive partitions), e.g. `lang=en/part-0.parquet`."""
    pairs = (part.split("=", 1) for part in name.split("/")[:-1] if re.match(r"[^=]+=", part))
    return {unquote(key): None if value == _NULL_PARTITION else unquote(value) for key, value in pairs}


def _stem(name: str) -> str:
    return _name(name).split(".")[0]


def _name(uri: str) -> str:
    return uri.rsplit("/", 1)[-1]


def _shorten(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMES_IN_A_NOTE:,} more" if len(names) > _NAMES_IN_A_NOTE else ""
    return ", ".join(names[:_NAMES_IN_A_NOTE]) + more
