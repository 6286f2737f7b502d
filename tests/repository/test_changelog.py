from __future__ import annotations

import re
import tomllib
from importlib import metadata

from packaging.version import Version

from tools.module_map import ROOT

HEADING = re.compile(r"^## (\S+) \((unreleased|\d{4}-\d{2}-\d{2})\)$", re.MULTILINE)


def test_the_top_entry_of_the_changelog_has_the_version_of_the_package():
    text = (ROOT / "CHANGELOG.md").read_text()
    headings = HEADING.findall(text)
    assert len(headings) == len(re.findall(r"^## ", text, re.MULTILINE)), "a heading reads: ## version (unreleased or YYYY-MM-DD)"
    assert headings[0][0] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_versions_of_the_changelog_are_newest_first_and_only_the_top_one_is_unreleased():
    headings = HEADING.findall((ROOT / "CHANGELOG.md").read_text())
    versions = [Version(version) for version, _ in headings]
    assert versions == sorted(set(versions), reverse=True)
    assert "unreleased" not in [date for _, date in headings[1:]]


def test_the_installed_package_has_the_version_of_the_project():
    assert metadata.version("cappy-ray") == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
