from __future__ import annotations

import subprocess
from pathlib import Path

from tools.module_map import ROOT


def test_setup_without_a_supported_python_names_the_pythons_it_tried_and_the_fix(tmp_path: Path):
    environment = tmp_path / "environment"
    setup = subprocess.run(
        ["make", "setup", f"VENV={environment}", "PYTHON=python3.99 false"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert setup.returncode != 0
    first = setup.stderr.splitlines()[0]
    assert "none of 'python3.99 false' is Python 3.11 or 3.12" in first
    assert "make setup PYTHON=" in first
    assert not environment.exists()


def test_help_lists_every_target_of_phony():
    makefile = (ROOT / "Makefile").read_text()
    phony = next(line for line in makefile.splitlines() if line.startswith(".PHONY:")).split()[1:]
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    assert [line.split()[1] for line in listed.splitlines()] == sorted(phony)
