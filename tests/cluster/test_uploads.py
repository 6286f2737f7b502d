"""Multipart uploads of killed runs: those below a destination are aborted, all others continue."""

from __future__ import annotations

import os
import subprocess
import sys

import boto3
import pytest

from cluster import artifacts, copying, lease, s3, s3_session, storage
from cluster.errors import CappyError
from generation import generate
from tests.faults import ACCESS_DENIED, FaultyProxy
from tests.generation.made_set import publish


def begin(uri):
    """Begin a multipart upload with one part, and leave it as a kill does."""
    bucket, key = s3.bucket_and_key(uri)
    client = s3_session.s3_client()
    upload = client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    client.upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=1, Body=bytes(5 << 20))
    return upload


def uploads(uri):
    found = boto3.client("s3", region_name="us-east-1").list_multipart_uploads(Bucket=s3.bucket_and_key(uri)[0])
    return sorted(each["Key"] for each in found.get("Uploads", ()))


def test_only_uploads_of_the_verb_below_the_destination_are_aborted(bucket):
    for name in ("set/data/train/part-00000-0123abcd.parquet", "set/README.md"):
        begin(f"{bucket}/{name}")
    others = ["set/thesis.pdf", "set/sub/data/train/part-00000-0123abcd.parquet", "set2/README.md", "README.md"]
    for name in others:
        begin(f"{bucket}/{name}")
    with lease.hold(f"{bucket}/set/_lease", "dataset") as held:
        artifacts.abort_uploads(f"{bucket}/set", generate._OWNED.includes, held.check)
    assert uploads(bucket) == sorted(others)


def test_the_uploads_of_a_run_that_has_the_lease_are_not_aborted(bucket):
    begin(f"{bucket}/set/README.md")
    with lease.hold(f"{bucket}/set/_lease", "dataset") as late:
        storage.create_json(late.successor, {"run": "the next run"})
        artifacts.abort_uploads(f"{bucket}/set", generate._OWNED.includes, late.check)
    assert uploads(bucket) == ["set/README.md"]


def test_more_than_one_page_of_uploads_is_aborted(bucket, monkeypatch):
    for number in range(5):
        begin(f"{bucket}/a/part-{number}")
    client = s3_session.s3_client()
    real = client.list_multipart_uploads
    monkeypatch.setattr(client, "list_multipart_uploads", lambda **options: real(**options, MaxUploads=2))
    artifacts.abort_uploads(f"{bucket}/a", lambda name: name != "part-3", lambda: None)
    assert uploads(bucket) == ["a/part-3"]


def test_a_killed_push_leaves_no_upload_after_the_next(bucket, tmp_path):
    manifest = publish(f"{tmp_path}/a", letters="x" * (20 << 20) + "\n")
    kill = (
        "import os\nfrom cluster import copying, s3_session\n"
        "real = s3_session.s3_client().upload_part\n"
        "def upload_part(**options):\n    real(**options); os.kill(os.getpid(), 9)\n"
        f"s3_session.s3_client().upload_part = upload_part\ncopying.copy_folder({f'{tmp_path}/a'!r}, {f'{bucket}/a'!r})"
    )
    assert subprocess.run([sys.executable, "-c", kill], stderr=subprocess.DEVNULL).returncode == -9
    assert uploads(bucket) == ["a/dead_letters.jsonl"]
    copying.copy_folder(f"{tmp_path}/a", f"{bucket}/a")
    assert uploads(bucket) == [] and set(storage.list_files(f"{bucket}/a")) == {*manifest["files"], "_MANIFEST.json"}


def test_a_store_that_does_not_permit_to_list_uploads_is_usable(bucket, tmp_path, monkeypatch, capfd):
    publish(f"{tmp_path}/a")
    answer = lambda method, path: (403, ACCESS_DENIED) if "uploads" in path else None  # noqa: E731
    with FaultyProxy(os.environ["AWS_ENDPOINT_URL"], answer=answer) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        copying.copy_folder(f"{tmp_path}/a", f"{bucket}/a")
    assert f"incomplete uploads below {bucket}/a could not be removed" in capfd.readouterr().err
    with pytest.raises(CappyError, match="already holds another finished run"):
        publish(f"{tmp_path}/b", train=(1,))
        copying.copy_folder(f"{tmp_path}/b", f"{bucket}/a")
