"""Tables for people: units, copies and checks."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from cappy import display
from cappy.doctor import Finding


def printed(show, *arguments) -> str:
    sink = io.StringIO()
    show(*arguments, Console(file=sink, width=100))
    return sink.getvalue()


def test_durations_and_sizes_have_readable_units():
    assert [display.duration(hours) for hours in (0.5 / 3600, 12 / 3600, 0.5, 7.25, 100)] == [
        "0.5 s",
        "12 s",
        "30.0 min",
        "7.2 h",
        "4.2 days",
    ]
    assert [display.size(count) for count in (283_000, 1.4e6, 21e9, 2.5e12)] == ["283.0 kB", "1.4 MB", "21.0 GB", "2.5 TB"]


@pytest.mark.parametrize(
    ("copied", "text"),
    [(2, "scorer s3://b/x: 2 of 3 files copied, 1.5 MB at 10 MB/s"), (0, "scorer s3://b/x: all 3 files are already there")],
)
def test_a_copy_shows_the_copied_files_or_that_all_exist(copied, text):
    result = {"kind": "scorer", "uri": "s3://b/x", "files": 3, "copied_files": copied, "copied_bytes": 1_500_000, "mb_per_second": 10.0}
    assert printed(display.show_copy, result).strip() == text


def test_checks_show_the_fix_below_a_failure():
    findings = [Finding("python", True, "3.11.7"), Finding("cache", False, "/x: read-only", "set CAPPY_CACHE")]
    lines = [line.strip() for line in printed(display.show_findings, findings).splitlines()]
    assert [line.split() for line in lines[:3]] == [
        ["ok", "python", "3.11.7"],
        ["FAIL", "cache", "/x:", "read-only"],
        ["->", "set", "CAPPY_CACHE"],
    ]
    assert lines[3] == "1 of 2 checks failed"
