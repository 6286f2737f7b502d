from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tools.module_map import ROOT

LOCKS = sorted((ROOT / "requirements").glob("*.lock"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# A requirement, then one or more hashes, each on a separate line.
ENTRY = re.compile(r"^([a-z0-9._-]+)(?:\[[^]]*\])?==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.MULTILINE)
TORCH = ROOT / "requirements" / "torch-cpu.txt"


def pins(file: Path) -> dict[str, Version]:
    """The versions of a lock by package name; every requirement in it must carry a hash."""
    text = file.read_text()
    found = {match[1]: Version(match[2]) for match in ENTRY.finditer(text)}
    assert len(found) == sum("==" in line for line in text.splitlines() if not line.lstrip().startswith("#"))
    return found


def test_there_is_a_lock_for_each_machine_kind_and_supported_python():
    supported = PROJECT["requires-python"]
    assert supported == ">=3.11,<3.13"
    assert {file.name for file in LOCKS} == {f"{kind}-py{python}.lock" for kind in ("cpu", "gpu") for python in (311, 312)}


@pytest.mark.parametrize("file", LOCKS, ids=lambda file: file.stem)
def test_a_lock_pins_every_requirement_within_its_range(file: Path):
    kind = file.name.split("-")[0]
    locked = pins(file) | (pins(TORCH) if kind == "cpu" else {})
    extras = PROJECT["optional-dependencies"]
    engine = extras["cpu" if kind == "cpu" else "vllm"]
    wanted = [Requirement(text) for text in (*PROJECT["dependencies"], *engine, *extras["dev"], *extras["docs"])]
    assert len(wanted) > 40
    wrong = [str(need) for need in wanted if not need.specifier.contains(locked[need.name.lower()], prereleases=True)]
    assert wrong == []


def test_cpu_locks_leave_out_cuda_builds():
    for file in LOCKS:
        cuda = {"torchvision", "torchaudio", "torchcodec", "nvidia-nccl-cu13"} & pins(file).keys()
        assert bool(cuda) == file.name.startswith("gpu"), file.name


def test_torch_for_cpu_is_the_version_of_the_gpu_locks_with_a_hash_for_each_python_and_architecture():
    torch = pins(TORCH)["torch"]
    assert torch.local == "cpu"
    for file in LOCKS:
        if file.name.startswith("gpu"):
            assert pins(file)["torch"] == Version(torch.public)
    assert len(set(re.findall(r"--hash=sha256:(\S+)", TORCH.read_text()))) == 4
