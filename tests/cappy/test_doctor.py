"""The checks of `cappy doctor`, one by one, on this machine and on broken settings. The command itself is tested in test_cli.py."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from cappy import doctor
from cluster import storage
from cluster.config import Config


def test_an_import_that_fails_names_the_package_the_reason_and_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "broken_fox.py").write_text("raise RuntimeError('no fox here\\nsecond line')")
    monkeypatch.syspath_prepend(str(tmp_path))
    finding = doctor._import("broken_fox", "broken-fox")
    assert (finding.check, finding.ok, finding.remedy) == ("import broken_fox", False, "run `make setup`")
    assert "no fox here" in finding.detail and "second line" not in finding.detail
    assert doctor._import("no_such_fox", "fox").ok is False


def test_a_cuda_build_of_torchvision_has_its_own_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "broken_eye.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "pip uninstall torchvision" in doctor._import("broken_eye", "eye").remedy


def test_an_import_reports_the_version_of_its_distribution():
    found = doctor._import("pytest", "pytest")
    assert found.ok and found.detail == f"pytest {pytest.__version__}"
    assert doctor._import("json", "json").detail == "version unknown"


@pytest.mark.parametrize(("version", "ok"), [((3, 10, 9), False), ((3, 11, 0), True), ((3, 12, 9), True), ((3, 13, 0), False)])
def test_python_3_11_and_3_12_are_supported(version: tuple[int, int, int], ok: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "version_info", version)
    finding = doctor._python()
    assert finding.ok is ok and finding.detail == ".".join(map(str, version))
    assert bool(finding.remedy) is not ok


def test_a_cache_that_cannot_be_written_or_is_nearly_full_names_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CAPPY_CACHE", str(tmp_path / "file" / "cache"))
    assert not doctor._cache().ok and "CAPPY_CACHE" in doctor._cache().remedy
    monkeypatch.setenv("CAPPY_CACHE", str(tmp_path / "cache"))
    assert doctor._cache().ok
    free = shutil.disk_usage(tmp_path).free / 2**30
    monkeypatch.setattr(doctor, "_FREE_GIB", free + 1000)
    assert not doctor._cache().ok and "CAPPY_CACHE" in doctor._cache().remedy
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("local", [True, False])
def test_a_workspace_is_probed_and_left_as_it_was(local: bool, tmp_path: Path, request: pytest.FixtureRequest):
    uri = str(tmp_path / "new" / "workspace") if local else f"{request.getfixturevalue('bucket')}/workspace"
    finding = doctor._storage(Config(workspace=uri))
    assert finding.ok and "commits exclusively" in finding.detail
    assert not list(tmp_path.iterdir()) and not storage.list_files(uri)


def test_a_store_that_ignores_conditional_writes_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # Some S3 servers accept `If-None-Match` and write all the same.
    def overwrite(uri: str, value: object) -> bool:
        Path(uri).write_text("{}")
        return True

    monkeypatch.setattr(storage, "create_json", overwrite)
    finding = doctor._storage(Config(workspace=str(tmp_path)))
    assert not finding.ok and "If-None-Match" in finding.remedy


def test_a_model_that_does_not_exist_names_its_setting(tmp_path: Path):
    finding = doctor._model("scorer.encoder", str(tmp_path / "nothing"))
    assert not finding.ok and "scorer.encoder" in finding.detail and finding.remedy.startswith("set scorer.encoder to")
    assert doctor._model("scorer.encoder", "minilm-l6").ok
