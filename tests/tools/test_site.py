"""The documentation site as `make docs` builds it."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tools import reference

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    assert (built.returncode, built.stderr) == (0, "")
    return folder


class Assets(HTMLParser):
    """The URLs a browser loads with a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "video"):
            self.urls.append(given.get("src") or "")
        if tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.urls.append(given.get("href") or "")


def test_no_page_loads_anything_from_another_host(site):
    pages = sorted(site.rglob("*.html"))
    assert {"index.html", "results.html", "settings.html", "serve.html"} <= {page.name for page in pages}
    urls = [(page.name, url) for page in pages for url in Assets(page).urls if url]
    assert urls
    assert [each for each in urls if re.match(r"(\w+:)?//", each[1])] == []
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(\s*[\"']?(https?:)?//|@import", style.read_text()), style


def test_assets_and_images_are_files_of_the_site(site):
    for page in site.rglob("*.html"):
        if page.name != "404.html":  # its paths are absolute
            for url in Assets(page).urls:
                assert not url or (page.parent / url.partition("?")[0]).is_file(), f"{page}: {url}"


def test_generated_reference_pages_show_the_docstrings_of_the_code(site):
    settings = (site / "reference" / "settings.html").read_text()
    assert 'id="training.batch_size"' in settings and "Pairs per optimizer step, summed over all workers." in settings
    assert "cappy config show" in (site / "reference" / "cli.html").read_text()
    python = (site / "reference" / "python.html").read_text()
    for name, target in reference.public_names():
        assert name in python and f'id="{target}"' in python
