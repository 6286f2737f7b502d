"""Write the files of one folder, unless another run took the folder over. Imports `cluster.artifacts` and `cluster.storage`."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from cluster import disk
from cluster.artifacts import refuse_published_meanwhile
from cluster.errors import CappyError
from cluster.s3 import call_with_retries, has_sha256, put_local_file, put_object
from cluster.storage import absolute, is_s3, join, json_bytes, sha256, version

# Attempts for a conditional write, in case another process writes the same file.
_REPLACE_ATTEMPTS = 5


class FolderWriter:
    """Write files below one folder without replacing a file of a run that took over the folder.

    Each write reads the `version` of the file, calls `check`, and writes only if the version is unchanged. It uses `If-Match` or
    `If-None-Match` on S3, and a hard link or a compared rename on disk. A file that another run wrote after `check` passed has
    another version, so the write is refused and `check` is called again. Two windows remain. On disk, a rename follows the
    last comparison by some microseconds. On S3, a file that was written again with the same bytes has the same ETag.

    `check` raises `CappyError` once the folder belongs to another run, e.g. `Lease.check`. By default it raises once the folder has
    a manifest. With `sync` each file on disk is synced before it gets its name.
    """

    def __init__(self, uri: str, check: Callable[[], None] | None = None, *, sync: bool = True) -> None:
        self.uri, self._sync = uri, sync
        self._check = check or partial(refuse_published_meanwhile, uri)

    def write_bytes(self, name: str, data: bytes) -> dict[str, Any]:
        """Write a whole file; return its entry for a manifest."""
        uri = join(self.uri, name)
        digest = hashlib.sha256(data).hexdigest()
        if is_s3(uri):
            self._write(uri, digest, lambda condition: put_object(uri, data, **condition))
        else:
            with self._beside(uri) as temporary:
                disk.write(temporary, data, sync=self._sync)
                self._move(uri, temporary)
        return {"bytes": len(data), "sha256": digest}

    def write_json(self, name: str, value: Any) -> dict[str, Any]:
        """Write a JSON file; return its entry for a manifest."""
        return self.write_bytes(name, json_bytes(value))

    def upload_file(self, file: Path, name: str, *, move: bool = False) -> dict[str, Any]:
        """Copy a local file; return its entry for a manifest. With `move` the file can be renamed instead, so do not use it afterwards."""
        uri = join(self.uri, name)
        digest = sha256(str(file))
        entry = {"bytes": file.stat().st_size, "sha256": digest}
        if is_s3(uri):
            self._write(uri, digest, partial(put_local_file, uri, file, entry))
        elif move:
            with disk.errors_of(absolute(uri)):
                disk.make_folder(Path(absolute(uri)).parent)
                disk.sync_file(file)
                self._move(uri, file)
        else:
            with self._beside(uri) as temporary:
                shutil.copyfile(file, temporary)
                disk.sync_file(temporary)
                self._move(uri, temporary)
        return entry

    def upload_folder(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Copy every file of a local folder; return the entry of each for a manifest, by its path."""
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        return {name: self.upload_file(path, name) for name, path in files.items()}

    @contextmanager
    def _beside(self, uri: str) -> Iterator[Path]:
        """Yield a temporary path beside a file on disk. An `OSError` inside the block is raised as `CappyError`."""
        target = Path(absolute(uri))
        with disk.errors_of(target), disk.temporary_file_beside(target) as temporary:
            yield temporary

    def _write(self, uri: str, digest: str, send: Callable[[dict[str, str]], None]) -> None:
        from botocore.exceptions import ClientError

        for _ in range(_REPLACE_ATTEMPTS):
            seen = version(uri)
            self._check()
            condition = {"IfNoneMatch": "*"} if seen is None else {"IfMatch": seen}
            try:
                call_with_retries(uri, partial(send, condition))
                return
            except (ClientError, FileNotFoundError):  # 412: another version; or the file to replace was removed
                # If the response to an earlier attempt was lost, the other version is this write.
                if has_sha256(uri, digest):
                    return
        raise _contention_error(uri)

    def _move(self, uri: str, file: Path) -> None:
        target = Path(absolute(uri))
        for _ in range(_REPLACE_ATTEMPTS):
            seen = version(uri)
            self._check()
            if seen is None:
                try:
                    os.link(file, target)
                except FileExistsError:
                    continue
                file.unlink()
            elif version(uri) == seen:
                file.replace(target)
            else:
                continue
            if self._sync:
                disk.sync_folder(target.parent)
            return
        raise _contention_error(uri)


def _contention_error(uri: str) -> CappyError:
    return CappyError(f"{uri}: another process writes this file too; stop one of them, then run the command again")
