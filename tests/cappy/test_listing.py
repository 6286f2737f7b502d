"""`cappy list`: published folders, unfinished runs and damaged manifests, on disk and in S3."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cappy import listing
from cappy.cli import app
from cluster import artifacts, storage
from cluster.errors import CappyError


def publish(uri: str, kind: str, rows: int) -> None:
    entry = storage.write_bytes(storage.join(uri, "data.txt"), b"x" * 10)
    artifacts.publish(
        uri,
        {
            "kind": kind,
            "version": 1,
            "created": "2026-01-01T00:00:00+00:00",
            "files": {"data.txt": entry},
            "summary": {"instructions": rows},
        },
    )


def test_it_lists_published_folders_and_unfinished_runs(tmp_path: Path):
    publish(str(tmp_path / "demo" / "dataset"), "dataset", 12)
    publish(str(tmp_path / "demo" / "scorer"), "scorer", 3)
    # Checkpoints have manifests, but are not published folders.
    publish(str(tmp_path / "demo" / "scorer" / "_checkpoints" / "f00d" / "00000010-abc"), "checkpoint", 0)
    storage.write_bytes(str(tmp_path / "demo" / "answers" / "_lease" / "000001.json"), b"{}")
    storage.write_bytes(str(tmp_path / "demo" / "_staging" / "units" / "0.parquet"), b"1234")
    found = {entry["path"]: entry for entry in listing.list_published(str(tmp_path))}
    assert {path: (entry["kind"], entry["rows"]) for path, entry in found.items()} == {
        "demo": ("unfinished", None),
        "demo/answers": ("unfinished", None),
        "demo/dataset": ("dataset", 12),
        "demo/scorer": ("scorer", 3),
    }
    assert found["demo/dataset"]["bytes"] == 10 and found["demo/dataset"]["created"] == "2026-01-01T00:00:00+00:00"
    assert found["demo/scorer"]["uri"] == str(tmp_path / "demo" / "scorer")


def test_a_published_folder_lists_itself(tmp_path: Path):
    publish(str(tmp_path), "dataset", 5)
    [entry] = listing.list_published(str(tmp_path))
    assert (entry["path"], entry["uri"], entry["rows"]) == ("", str(tmp_path), 5)


def test_a_damaged_manifest_does_not_hide_the_others(tmp_path: Path):
    publish(str(tmp_path / "good"), "dataset", 5)
    storage.write_bytes(str(tmp_path / "bad" / artifacts.MANIFEST), b"{")
    found = {entry["path"]: entry for entry in listing.list_published(str(tmp_path))}
    assert found["good"]["kind"] == "dataset"
    assert found["bad"]["kind"] == "unreadable" and "no readable _MANIFEST.json" in str(found["bad"]["problem"])


def test_an_empty_prefix_is_an_error(tmp_path: Path):
    with pytest.raises(CappyError, match=r"URI=.*there are no files"):
        listing.list_published(str(tmp_path / "nothing"))


def test_it_lists_a_prefix_in_s3(bucket: str):
    publish(f"{bucket}/runs/a/dataset", "dataset", 7)
    publish(f"{bucket}/runs/b/dataset", "dataset", 8)
    publish(f"{bucket}/runs-old/dataset", "dataset", 9)
    assert [(entry["uri"], entry["rows"]) for entry in listing.list_published(f"{bucket}/runs")] == [
        (f"{bucket}/runs/a/dataset", 7),
        (f"{bucket}/runs/b/dataset", 8),
    ]


def test_the_command_prints_a_table_and_json(tmp_path: Path):
    publish(str(tmp_path / "a"), "dataset", 1234)
    storage.write_bytes(str(tmp_path / "b" / "_lease" / "000001.json"), b"{}")
    shown = CliRunner().invoke(app, ["list", str(tmp_path)])
    assert shown.exit_code == 0 and "1,234" in shown.output and "1 unfinished" in shown.output
    printed = CliRunner().invoke(app, ["list", str(tmp_path), "--json"])
    assert [entry["kind"] for entry in json.loads(printed.output)["entries"]] == ["dataset", "unfinished"]
