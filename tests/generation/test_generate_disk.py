"""`generate` on a disk that is full for a while."""

from __future__ import annotations

import json

import pytest

from cappy import jobs
from cluster import artifacts, storage
from cluster.config import load
from cluster.errors import CappyError
from generation import generate
from generation.dataset import RegressionSet
from tests.generation.fixed_llm import FixedLLM

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_here")]


@pytest.mark.parametrize("room", [24, 60], ids=["reading", "sampling"])
def test_a_run_on_a_full_disk_names_the_path_and_resumes_with_space(room, small_disk, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "load_verb", lambda verb: lambda config, overwrite: generate.run_generate(config, load=FixedLLM))
    rows = [{"instruction": f"say {number}", "references": [f"number {number}"], "dataset": "d"} for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = f"{small_disk.folder}/set"
    config = load(None, [f"source={{kind: files, path: '{tmp_path}/rows.jsonl'}}", f"dataset={place}", "generate.unit_rows=8"])
    small_disk.fill()
    with (small_disk.folder / "filler").open("r+b") as filler:
        filler.truncate(filler.seek(0, 2) - (room << 10))
    with pytest.raises(CappyError, match=rf"^{place}/.* cannot be written \(No space left on device\); free some space") as caught:
        jobs.run_verb("generate", config)
    assert "\n" not in str(caught.value) and not storage.exists(f"{place}/_MANIFEST.json")
    small_disk.free()
    summary = jobs.run_verb("generate", config)
    assert summary["instructions"] == 40
    manifest = RegressionSet(place).manifest
    assert artifacts.verify(place, manifest) == []
    assert set(small_disk.files()) == {f"set/{name}" for name in (*manifest["files"], "_MANIFEST.json")}
