import http.client
import json
import os
import signal
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from cluster import artifacts, copying, storage
from cluster.errors import CappyError, UsageError
from generation.dataset import RegressionSet
from tests.conftest import CAPPY, cappy
from tests.generation.made_set import publish

SHARD = "data/train/part-00001.parquet"


@pytest.fixture(params=[("disk", "disk"), ("disk", "s3"), ("s3", "disk"), ("s3", "s3")], ids="-to-".join)
def endpoints(request, tmp_path):
    """(source, destination), each on disk or in object storage."""
    kinds = zip(request.param, ("source", "destination"), strict=True)
    return tuple(f"{request.getfixturevalue('bucket')}/{name}" if kind == "s3" else str(tmp_path / name) for kind, name in kinds)


def flip(uri, place=-9):
    """Change one byte of a file; return the original bytes."""
    sound = storage.read_bytes(uri)
    damaged = bytearray(sound)
    damaged[place] ^= 1
    storage.write_bytes(uri, bytes(damaged))
    return sound


def test_a_copy_is_the_same_set_and_records_its_source(endpoints):
    source, destination = endpoints
    manifest = publish(source)
    result = copying.copy_folder(source, destination)
    assert result["copied_files"] == result["files"] == len(manifest["files"])
    there = storage.read_json(f"{destination}/_MANIFEST.json")
    assert there.pop("copied_from") == source and there.pop("writer") != manifest.pop("writer")
    assert there == manifest and artifacts.verify(destination, there) == []
    assert set(storage.list_files(destination)) == {*manifest["files"], "_MANIFEST.json"}
    assert RegressionSet(destination).to_pandas().equals(RegressionSet(source).to_pandas())
    again = copying.copy_folder(source, destination)
    assert again["copied_files"] == 0 and again["files"] == len(manifest["files"])


def test_a_flipped_byte_stops_the_copy_and_the_copy_resumes_after_a_repair(endpoints):
    source, destination = endpoints
    manifest = publish(source)
    sound = flip(f"{source}/{SHARD}")
    with pytest.raises(CappyError, match=rf"{SHARD} does not match its SHA-256, read 3 times; nothing is published"):
        copying.copy_folder(source, destination)
    there = storage.list_files(destination)
    assert "_MANIFEST.json" not in there and SHARD not in there
    with pytest.raises(CappyError, match=r"did not finish|is not there"):
        RegressionSet(destination)
    storage.write_bytes(f"{source}/{SHARD}", sound)
    result = copying.copy_folder(source, destination)
    assert result["copied_files"] == len(manifest["files"]) - len(there)
    assert artifacts.verify(destination, manifest) == []


def test_a_damaged_or_short_file_left_at_the_destination_is_copied_again(endpoints):
    source, destination = endpoints
    manifest = publish(source)
    copying.copy_folder(source, destination)
    storage.delete(f"{destination}/_MANIFEST.json")
    flip(f"{destination}/{SHARD}")
    storage.write_bytes(f"{destination}/config.yaml", b"seed")
    assert copying.copy_folder(source, destination)["copied_files"] == 2
    assert artifacts.verify(destination, manifest) == []


def test_a_destination_with_another_finished_run_or_other_files_is_not_touched(endpoints):
    source, destination = endpoints
    publish(source)
    publish(destination, train=(2,))
    before = storage.list_files(destination)
    with pytest.raises(UsageError, match=rf"DST={destination} already holds another finished run; choose another place"):
        copying.copy_folder(source, destination)
    storage.delete(f"{destination}/_MANIFEST.json")
    storage.write_bytes(f"{destination}/data/train/part-00099.parquet", b"x")
    with pytest.raises(UsageError, match=r"holds other files, data/train/part-00099.parquet first of 1; choose an empty place"):
        copying.copy_folder(source, destination)
    assert storage.list_files(destination).items() >= {key: size for key, size in before.items() if key != "_MANIFEST.json"}.items()


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "data/../../outside", "a\\b", "_MANIFEST.json"])
def test_a_manifest_that_names_a_file_outside_its_folder_is_refused(name, tmp_path):
    (tmp_path / "outside").write_text("x")
    artifacts.publish(str(tmp_path / "a"), {"kind": "dataset", "files": {name: {"bytes": 1, "sha256": "0"}}})
    with pytest.raises(CappyError, match="is not within the folder; do not use it"):
        copying.copy_folder(str(tmp_path / "a"), str(tmp_path / "b" / "c"))
    assert not (tmp_path / "b").exists()


def test_an_unfinished_source_and_a_missing_file_are_errors(tmp_path):
    with pytest.raises(CappyError, match=r"SRC=.*/none has no readable _MANIFEST.json"):
        copying.copy_folder(f"{tmp_path}/none", f"{tmp_path}/b")
    publish(f"{tmp_path}/a")
    storage.delete(f"{tmp_path}/a/{SHARD}")
    with pytest.raises(CappyError, match=rf"{SHARD} is missing, its manifest names it; nothing is published"):
        copying.copy_folder(f"{tmp_path}/a", f"{tmp_path}/b")


def test_any_published_folder_can_be_copied(tmp_path, bucket):
    storage.write_bytes(f"{tmp_path}/scorer/model.safetensors", os.urandom(20_000_000))
    storage.write_bytes(f"{tmp_path}/scorer/empty", b"")
    storage.write_bytes(f"{tmp_path}/scorer/_checkpoints/step-1", b"not published")
    files = artifacts.checksums(f"{tmp_path}/scorer", ["model.safetensors", "empty"])
    artifacts.publish(f"{tmp_path}/scorer", {"kind": "scorer", "files": files})
    copying.copy_folder(f"{tmp_path}/scorer", f"{bucket}/scorer")
    assert set(storage.list_files(f"{bucket}/scorer")) == {"model.safetensors", "empty", "_MANIFEST.json"}
    assert artifacts.verify(f"{bucket}/scorer", artifacts.read_manifest(f"{bucket}/scorer", "scorer", "train")) == []


@pytest.fixture
def flipping(bucket):
    """A proxy for reading from the object store that flips a byte of a shard, once; yields its URL and the list of flipped paths."""
    store = urlsplit(os.environ["AWS_ENDPOINT_URL"])
    flipped = []

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self):
            upstream = http.client.HTTPConnection(store.netloc, timeout=30)
            upstream.request(self.command, self.path, headers=dict(self.headers))
            answer = upstream.getresponse()
            data = bytearray(answer.read())
            if data and self.path.endswith(SHARD) and not flipped:
                flipped.append(self.path)
                data[len(data) // 2] ^= 1
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", flipped
    server.shutdown()
    server.server_close()


def test_a_byte_flipped_in_transfer_is_detected_and_the_file_is_read_again(bucket, tmp_path, flipping, monkeypatch):
    manifest = publish(f"{bucket}/a")
    url, flipped = flipping
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    copying.copy_folder(f"{bucket}/a", f"{tmp_path}/b")
    assert len(flipped) == 1 and artifacts.verify(f"{tmp_path}/b", manifest) == []


@pytest.mark.slow
def test_a_killed_copy_publishes_nothing_and_the_same_command_resumes(tmp_path, bucket):
    names = [f"part-{number:03d}" for number in range(120)]
    for name in names:
        storage.write_bytes(f"{tmp_path}/a/{name}", os.urandom(1_000_000))
    artifacts.publish(f"{tmp_path}/a", {"kind": "scorer", "files": artifacts.checksums(f"{tmp_path}/a", names)})
    push = subprocess.Popen([*CAPPY, "push", f"{tmp_path}/a", f"{bucket}/a"], stderr=subprocess.DEVNULL, start_new_session=True)

    def copied() -> list[str]:
        return [name for name in storage.list_files(f"{bucket}/a") if not name.startswith("_lease/")]

    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and len(copied()) < 10:
        assert push.poll() is None
    os.killpg(push.pid, signal.SIGKILL)
    push.wait()
    there = copied()
    assert 10 <= len(there) < 120 and "_MANIFEST.json" not in there
    result = json.loads(cappy("push", f"{tmp_path}/a", f"{bucket}/a", "--json").stdout.splitlines()[-1])
    # The store can still complete the uploads in progress when the copy was killed: one file per thread.
    assert 120 - len(there) - 8 <= result["copied_files"] <= 120 - len(there)
    assert artifacts.verify(f"{bucket}/a", artifacts.read_any_manifest(f"{bucket}/a", "a")) == []


def test_push_and_pull_copy_and_refuse_a_remote_destination(tmp_path, bucket):
    publish(f"{tmp_path}/a")
    pushed = cappy("push", f"{tmp_path}/a", f"{bucket}/a")
    assert pushed.returncode == 0 and f"dataset {bucket}/a: 7 of 7 files copied" in pushed.stdout
    (tmp_path / "here").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [*CAPPY, "pull", f"{bucket}/a", "--json"]
    pulled = subprocess.run(command, cwd=tmp_path / "here", env=environment, capture_output=True, text=True)
    assert json.loads(pulled.stdout.splitlines()[-1])["uri"] == f"{tmp_path}/here/a" and (tmp_path / "here/a/_MANIFEST.json").exists()
    refused = cappy("pull", f"{bucket}/a", f"{bucket}/b")
    assert refused.returncode == 2 and f"DST={bucket}/b is not on this machine; copy between stores with `cappy push" in refused.stderr
