from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools.module_map import ROOT

GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))


def load(file: Path) -> dict[Any, Any]:
    content = yaml.safe_load(file.read_text())
    assert isinstance(content, dict)
    return content


def steps(file: Path) -> Iterator[dict[str, Any]]:
    for job in load(file)["jobs"].values():
        yield from job["steps"]


def make_targets(command: str) -> list[str]:
    """The targets of every `make` in a shell command; variables such as PYTHON=... are left out."""
    command = re.sub(r"\$\{\{.*?\}\}", "VALUE", command)
    calls = re.findall(r"(?:^|[;&|]\s*)make((?:[ \t]+[^\s;&|]+)*)", command, re.MULTILINE)
    return [word for call in calls for word in call.split() if "=" not in word and not word.startswith("-")]


def known_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_targets_are_read_from_shell_commands():
    assert make_targets("make setup PYTHON=python${{ a.b }}\nmake check wheel && make -s test; cmake other") == [
        "setup",
        "check",
        "wheel",
        "test",
    ]


def test_there_is_a_workflow_for_check_test_docs_wheel_and_release():
    assert {file.stem for file in WORKFLOWS} >= {"check", "test", "docs", "wheel", "release"}


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_every_make_target_of_a_workflow_is_in_the_makefile(file: Path):
    used = [target for step in steps(file) for target in make_targets(step.get("run", ""))]
    assert used, f"{file.name} calls no target of the Makefile"
    assert set(used) - known_targets() == set()


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_a_workflow_names_its_triggers_permissions_and_time_limits(file: Path):
    workflow = load(file)
    # YAML 1.1 reads the key `on` as true.
    assert workflow[True]
    assert workflow["permissions"]
    assert all(job["timeout-minutes"] <= 120 for job in workflow["jobs"].values())


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_every_action_is_pinned_to_a_major_version(file: Path):
    used = [step["uses"] for step in steps(file) if "uses" in step]
    assert used
    assert [action for action in used if not re.fullmatch(r"actions/[a-z-]+@v\d+", action)] == []


def test_tests_run_on_every_supported_python():
    matrix = load(GITHUB / "workflows" / "test.yml")["jobs"]["test"]["strategy"]["matrix"]["python"]
    lowest, beyond = re.fullmatch(  # type: ignore[union-attr]
        r">=3\.(\d+),<3\.(\d+)", tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    ).groups()
    assert matrix == [f"3.{minor}" for minor in range(int(lowest), int(beyond))]


def test_ci_runs_check_and_test():
    assert make_targets((ROOT / ".ci" / "run").read_text()) == ["check", "test"]


@pytest.mark.parametrize("file", sorted((GITHUB / "ISSUE_TEMPLATE").glob("[!c]*.yml")), ids=lambda file: file.stem)
def test_an_issue_form_has_a_name_a_description_and_a_required_question(file: Path):
    form = load(file)
    assert form["name"]
    assert form["description"]
    assert any(part.get("validations", {}).get("required") for part in form["body"])
    names = [part["id"] for part in form["body"] if part["type"] != "markdown"]
    assert len(names) == len(set(names))
