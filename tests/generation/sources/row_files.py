"""Configs and JSONL files of small instruction rows, for tests of sources and few-shot examples."""

from __future__ import annotations

import json

from cluster.config import load

ROWS = [{"instruction": f"say {n}", "references": [f"{n}", f"number {n}"], "dataset": "d"} for n in range(40)]


def write_jsonl(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def files_config(path, *overrides):
    return load(None, [f"source={{kind: files, path: '{path}'}}", *overrides])
