"""Keep an embedded Ray private: it listens on loopback addresses only, and only this user can read its token file.

By default Ray listens on all addresses of the machine, and creates its token file with the default permissions. Imports no Ray at the top.
"""

from __future__ import annotations

import os
import secrets
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Ray's setting for macOS, where it listens on loopback addresses. It has the same effect on Linux.
_CLUSTER_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


@contextmanager
def private_ray() -> Iterator[None]:
    """Make a Ray that is started inside the block private. A Ray that is joined inside the block would not be reachable."""
    from ray._private import ray_constants

    protect_token(Path.home() / ".ray" / "auth_token")
    before, variable = ray_constants.ENABLE_RAY_CLUSTER, os.environ.get(_CLUSTER_VARIABLE)
    ray_constants.ENABLE_RAY_CLUSTER = False  # read once by the import of Ray
    os.environ[_CLUSTER_VARIABLE] = "0"  # for the processes of Ray
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        os.environ.pop(_CLUSTER_VARIABLE)
        if variable is not None:
            os.environ[_CLUSTER_VARIABLE] = variable


def protect_token(file: Path) -> None:
    """Create Ray's token file with permissions for this user only, or remove those of other users from an existing file.

    Does nothing if Ray uses no token, or a token of the user's own (`RAY_AUTH_TOKEN`, `RAY_AUTH_TOKEN_PATH`).
    """
    own = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if own or os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    with suppress(OSError):  # a home that cannot be written: Ray raises its own error
        if not file.exists():
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
                stream.write(secrets.token_hex(32))
            with suppress(FileExistsError):  # another process created it
                os.link(temporary, file)
            temporary.unlink()
        if file.stat().st_mode & 0o077:
            file.chmod(0o600)
