"""Writes below a folder that another run may take over."""

from __future__ import annotations

import pytest

from cluster import artifacts, folder_writer, storage
from cluster.errors import CappyError

both = pytest.mark.parametrize("place", ["disk", "s3"], indirect=True)


class Takeover:
    """A `check` that passes once and, right after it, lets the next run write; then it raises, as a lost lease does."""

    def __init__(self, write):
        self.write, self.passed = write, False

    def __call__(self):
        if self.passed:
            raise CappyError("lease lost")
        self.passed = True
        self.write()


SIZES = pytest.mark.parametrize("size", [5, 20 << 20], ids=["small", "in parts"])


@both
@SIZES
@pytest.mark.parametrize("before", [None, b"of an earlier run"], ids=["new", "replaced"])
def test_a_file_that_the_next_run_wrote_after_the_check_is_not_replaced(place, size, before, tmp_path):
    if before:
        storage.write_bytes(f"{place}/f", before)
    (tmp_path / "mine").write_bytes(bytes(size))
    late = folder_writer.FolderWriter(place, Takeover(lambda: storage.write_bytes(f"{place}/f", b"the winner's")))
    with pytest.raises(CappyError, match="lease lost"):
        late.upload_file(tmp_path / "mine", "f")
    assert storage.read_bytes(f"{place}/f") == b"the winner's"
    assert list(storage.list_files(place)) == ["f"]


@both
@SIZES
def test_the_holder_of_the_lease_creates_and_replaces_files(place, size, tmp_path):
    folder = folder_writer.FolderWriter(place, lambda: None)
    for content in (bytes(size), b"\1" * size, b"\1" * size):
        (tmp_path / "mine").write_bytes(content)
        entry = folder.upload_file(tmp_path / "mine", "a/f")
        assert artifacts.verify(place, {"files": {"a/f": entry}}) == []
        assert storage.read_bytes(f"{place}/a/f") == content
    assert list(storage.list_files(place)) == ["a/f"]
    assert folder.write_json("j", {"a": 1}) == artifacts.checksums(place, ["j"])["j"]
    (tmp_path / "place2").mkdir()
    (tmp_path / "place2" / "mine").write_bytes(content)
    folder_writer.FolderWriter(str(tmp_path / "place2")).upload_file(tmp_path / "place2" / "mine", "f", move=True)
    assert list(storage.list_files(str(tmp_path / "place2"))) == ["f"]


@both
def test_without_a_lease_nothing_is_written_beside_a_manifest_of_another_run(place):
    folder = folder_writer.FolderWriter(place)
    folder.write_bytes("f", b"mine")
    artifacts.publish(place, {"kind": "evaluation", "files": {}})
    with pytest.raises(CappyError, match="was published by another run meanwhile"):
        folder.write_bytes("f", b"mine again")
    assert storage.read_bytes(f"{place}/f") == b"mine"
