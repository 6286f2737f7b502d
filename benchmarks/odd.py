"""Count the rows of each input in a folder: read, published, set aside as dead letters, and merged.

    python -m benchmarks.odd FOLDER

Each file or folder in FOLDER is one source; the default is the odd inputs of the tests. A `NAME.yaml`
beside a file holds its PromptSource templates. No row may be lost:
rows in = rows out + dead letters + merged + blank renderings of templates. The exit code is 1 if an input loses a row.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cluster.config import Config, FilesSource, load
from cluster.errors import UsageError
from generation.few_shot import PreparationCounts, prepare_rows
from generation.sources import bigbench, files, folders, formats, promptsource, values
from generation.sources.row import DeadLetter


class Outcome(NamedTuple):
    """The rows of one input by their outcome."""

    rows_in: int
    published: list[dict[str, Any]]
    """The rows that `cappy generate` samples and labels, with their `split`."""
    dead_letters: list[DeadLetter]
    merged: int
    blank: int
    error: str | None
    """The error that ends the reading; the other fields are then of the rows before it."""

    @property
    def is_complete(self) -> bool:
        """Return whether each row in is published, a dead letter, merged or blank. After an error, rows may be unread."""
        found = len(self.published) + len(self.dead_letters) + self.merged + self.blank
        return found == self.rows_in or self.error is not None


def config_of(path: Path, *settings: str) -> Config:
    """Return a config whose source is one input, with further `settings`."""
    templates = [f"source.templates={path.with_suffix('.yaml')}"] if path.with_suffix(".yaml").is_file() else []
    return load(None, [f"source={{kind: files, path: '{path}'}}", *templates, *settings])


def measure(path: Path, *settings: str) -> Outcome:
    """Read one input as `cappy generate` does, before sampling."""
    config = config_of(path, *settings)
    published: list[dict[str, Any]] = []
    letters: list[DeadLetter] = []
    counts = PreparationCounts()
    rows_in, error = 0, None
    try:
        assert isinstance(config.source, FilesSource)
        rows_in = count_rows(config.source)
        for each in prepare_rows(config, counts=counts):
            if isinstance(each, DeadLetter):
                letters.append(each)
            else:
                published.append({"split": each[0], **each[1]})
    except UsageError as found:
        error = str(found)
    return Outcome(rows_in, published, letters, counts.merged, counts.blank, error)


def count_rows(source: FilesSource) -> int:
    """Return the number of rows in the files of a source, without converting any.

    A raw row counts once for each template, instance of a task, or example of a task.
    """
    templates = len(promptsource.load_templates(source.templates)[1]) if source.templates else None
    raws = (raw for file in folders.find(source.path).files for _, raw in files.read_rows(file.uri))
    return sum((templates or _parts(raw, source.format)) if isinstance(raw, Mapping) else 1 for raw in raws)


def _parts(raw: Mapping[str, Any], format: str) -> int:
    """Return the number of instances or examples in a task that can be read as a task, else 1."""
    name = formats.detect_format(raw) if format == "auto" else format
    if name == "natural-instructions" and _is_text(raw.get("Definition"), values.as_texts):
        lists = [raw.get(key) or [] for key in ("Positive Examples", "Instances")]
        return max(1, sum(map(len, lists))) if all(isinstance(each, list) for each in lists) else 1
    examples = raw.get("examples")
    if name == "bigbench" and isinstance(examples, list) and all(isinstance(each, Mapping) for each in examples):
        return max(1, len(examples)) if all(_is_text(raw.get(key), values.as_text) for key in bigbench.PREFIXES) else 1
    return 1


def _is_text(value: Any, convert: Callable[[Any, str], Any]) -> bool:
    try:
        convert(value, "")
    except ValueError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parents[1] / "tests" / "data" / "odd")
    arguments = parser.parse_args()
    lost = 0
    print(f"{'input':28} {'in':>6} {'out':>6} {'dead':>6} {'merged':>6} {'blank':>6}  first dead letter or error")
    for path in sorted(path for path in arguments.folder.iterdir() if path.suffix.lower() not in (".yaml", ".md")):
        outcome = measure(path)
        lost += not outcome.is_complete
        note = outcome.error or next((letter.reason for letter in outcome.dead_letters), "")
        counts = (outcome.rows_in, len(outcome.published), len(outcome.dead_letters), outcome.merged, outcome.blank)
        print(f"{path.name:28} " + " ".join(f"{count:6,}" for count in counts) + f"  {'' if outcome.is_complete else 'LOST '}{note}")
    raise SystemExit(1 if lost else 0)


if __name__ == "__main__":
    main()
