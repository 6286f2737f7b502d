"""Hooks of MkDocs: put the generated reference pages among the pages of the site."""

from __future__ import annotations

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from tools import reference, suites

PAGES = {
    "reference/settings.md": reference.settings_page,
    "reference/cli.md": reference.cli_page,
    "reference/python.md": reference.python_page,
    "reference/tests.md": suites.tests_page,
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, which exist in memory only."""
    for path, page in PAGES.items():
        files.append(File.generated(config, path, content=page()))
    return files
