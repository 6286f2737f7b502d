from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tools.module_map import ROOT

# The tests may themselves run below a `make`, whose variables would change the output of this one.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}


def test_setup_without_a_supported_python_names_the_pythons_it_tried_and_the_fix(tmp_path: Path):
    environment = tmp_path / "environment"
    setup = subprocess.run(
        ["make", "setup", f"VENV={environment}", "PYTHON=python3.99 false"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert setup.returncode != 0
    first = setup.stderr.splitlines()[0]
    assert "none of 'python3.99 false' is Python 3.11 or 3.12" in first
    assert "make setup PYTHON=" in first
    assert not environment.exists()


def test_help_lists_every_target_of_phony():
    makefile = (ROOT / "Makefile").read_text()
    phony = next(line for line in makefile.splitlines() if line.startswith(".PHONY:")).split()[1:]
    listed = subprocess.run(["make", "help"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout
    assert [line.split()[1] for line in listed.splitlines()] == sorted(phony)
