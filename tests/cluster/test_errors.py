"""The errors: one line each, and the same after pickling."""

from __future__ import annotations

import pickle

import pytest

from cluster.errors import CappyError, Stopped, UsageError, first_line, typed_first_line


@pytest.mark.parametrize(("kind", "exit_code"), [(CappyError, 1), (UsageError, 2), (Stopped, 143)])
def test_an_error_keeps_its_message_and_exit_code_when_pickled(kind, exit_code):
    copy = pickle.loads(pickle.dumps(kind("workers=3: use a multiple of 2")))
    assert type(copy) is kind
    assert str(copy) == "workers=3: use a multiple of 2"
    assert copy.exit_code == exit_code


@pytest.mark.parametrize(
    ("message", "line", "typed"),
    [
        ("no such file", "no such file", "ValueError: no such file"),
        ("\n  no such file\nat line 3", "no such file", "ValueError: no such file"),
        ("", "ValueError", "ValueError"),
        (" \n ", "ValueError", "ValueError"),
    ],
)
def test_the_first_line_of_an_error_is_never_empty(message, line, typed):
    assert first_line(ValueError(message)) == line
    assert typed_first_line(ValueError(message)) == typed
