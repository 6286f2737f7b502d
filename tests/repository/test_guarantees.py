"""Each guarantee in docs/guarantees.md names code, tests and benchmarks that exist."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def guarantees() -> dict[str, tuple[list[str], list[str]]]:
    """Return the names in the second and third cell of each row of the table, by the guarantee in the first one."""
    section = (ROOT / "docs/guarantees.md").read_text().split("\n## ")[1]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| ")]
    return {guarantee: (re.findall(r"`([^`]+)`", code), re.findall(r"`([^`]+)`", attack)) for guarantee, code, attack in rows[2:]}


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_the_table_has_all_guarantees():
    assert len(guarantees()) == 33


@pytest.mark.parametrize("guarantee", guarantees())
def test_the_code_and_the_attack_of_a_guarantee_exist(guarantee: str):
    code, attacks = guarantees()[guarantee]
    assert code and attacks
    for path in code:
        assert (ROOT / path).is_file(), path
    for attack in attacks:
        if attack.startswith("python -m "):
            assert importlib.util.find_spec(attack.split()[2]), attack
        else:
            path, name = attack.split("::")
            assert name in functions(ROOT / path), attack
