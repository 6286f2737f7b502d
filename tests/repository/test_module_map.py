from __future__ import annotations

from pathlib import Path

import pytest

from tools import module_map

PROJECT = '[tool.setuptools.packages.find]\ninclude = ["alpha*", "beta*"]\n'


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with two packages and a CONTRIBUTING.md whose map is empty."""
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    for file, text in {
        "alpha/__init__.py": '"""Alpha. It has two sentences."""\n',
        "alpha/deep/__init__.py": '"""Deeper: `a | b`.\n\nMore."""\n',
        "beta/__init__.py": '"""Beta, version 0.1 of\nit."""\n',
        "tests/test_alpha.py": "",
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    (tmp_path / module_map.PAGE).write_text(f"before\n{module_map.BEGIN}\n{module_map.END}\nafter\n")
    return tmp_path


def test_contributing_lists_every_product_module_with_its_purpose():
    page = (module_map.ROOT / module_map.PAGE).read_text()
    files = module_map.modules(module_map.ROOT)
    assert len(files) > 90
    assert [str(file) for file in files if f"| `{file.as_posix()}` | " not in page] == []
    assert module_map.main(["--check"]) == 0


def test_the_map_is_written_between_its_markers(project: Path):
    assert module_map.main([], project) == 0
    assert (project / module_map.PAGE).read_text().splitlines() == [
        "before",
        module_map.BEGIN,
        "| module | purpose |",
        "| --- | --- |",
        "| `alpha/__init__.py` | Alpha. |",
        "| `alpha/deep/__init__.py` | Deeper: `a \\| b`. |",
        "| `beta/__init__.py` | Beta, version 0.1 of it. |",
        module_map.END,
        "after",
    ]


def test_a_check_fails_when_a_module_is_new_and_changes_nothing(project: Path, capsys: pytest.CaptureFixture[str]):
    module_map.main([], project)
    assert module_map.main(["--check"], project) == 0
    (project / "beta" / "new.py").write_text('"""A new module."""\n')
    before = (project / module_map.PAGE).read_text()
    assert module_map.main(["--check"], project) == 1
    assert "make module-map" in capsys.readouterr().err
    assert (project / module_map.PAGE).read_text() == before


def test_a_module_without_a_docstring_is_an_error_that_names_it(project: Path):
    (project / "beta" / "silent.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"beta/silent\.py has no docstring"):
        module_map.main([], project)


def test_a_missing_marker_is_an_error_that_shows_it(project: Path):
    (project / module_map.PAGE).write_text("no markers\n")
    with pytest.raises(ValueError, match="modules: begin"):
        module_map.main([], project)
