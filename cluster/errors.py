"""The errors that an operator can act on, and one-line texts for the errors of libraries. Imports `cluster.redaction` only."""

from __future__ import annotations

import errno
import os

from cluster.redaction import redact_text

# Errors of a full or broken disk.
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}


class CappyError(Exception):
    """A failure the operator can act on. Exit code 1.

    The message is one line: the failure, the setting with its value, and the fix. It is the only positional argument:
    Ray pickles exceptions by their `args`, so a second argument would be lost. Credentials in URLs are replaced: an error reaches logs,
    dead letters and clients.
    """

    exit_code = 1

    def __init__(self, *message: object) -> None:
        super().__init__(*(redact_text(part) if isinstance(part, str) else part for part in message))


class UsageError(CappyError):
    """The command, a setting or an input is invalid. Exit code 2."""

    exit_code = 2


class Stopped(CappyError):
    """A stop signal ended the run after it saved its state; the same command resumes it. Exit code 143, that of SIGTERM."""

    exit_code = 143


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if the message is empty."""
    return redact_text(next(iter(str(error).strip().splitlines()), type(error).__name__))


def typed_first_line(error: BaseException) -> str:
    """Return `TypeName: first line of the message`, or the name of the type alone if the message is empty."""
    name = type(error).__name__
    return f"{name}: {first_line(error)}" if str(error).strip() else name


def describe_disk_error(error: OSError, path: str) -> str:
    """Return one line for a file that cannot be written, with the fix."""
    reason = os.strerror(error.errno) if error.errno else first_line(error)
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    fix = "free some space there" if full else "check the disk and its permissions, or choose another place"
    return f"{path} cannot be written ({reason}); {fix}, then run the same command again"


def find_disk_error(error: BaseException) -> OSError | None:
    """Return the error of a full or broken disk, or None if `error` is another error.

    Libraries in other languages raise their own types, with the text of the error.
    """
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return error
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if os.strerror(errno.ENOSPC) in str(error) else None
