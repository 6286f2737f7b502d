"""Shared fixtures: a real S3 server on loopback, an embedded Ray, and the environment of the tests."""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from cluster import ports
from cluster.config import DEMO_TASKS

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
# Ray's workers have a low priority by default, so on a busy machine they would wait for the other tests.
os.environ.setdefault("RAY_worker_niceness", "0")
# By default vLLM's CPU engine starts another process, which imports vLLM again.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

# Every BIG-bench task that a test reads. The archive is a stream, and reading it once takes half a minute.
BIGBENCH_TASKS = (
    *DEMO_TASKS,
    *("conlang_translation", "date_understanding", "gem", "hindi_question_answering", "physics_questions", "semantic_parsing_spider"),
)
CAPPY = [sys.executable, "-m", "cappy.cli"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with slow tests first, starting with the two longest, so that short tests fill the end of a parallel run."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.name not in ("test_end_to_end.py", "test_train.py"), item.path not in slow))


def cappy(*arguments: str, timeout: float = 600, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a separate process, as a user does."""
    return subprocess.run(
        [*CAPPY, *arguments], capture_output=True, text=True, timeout=timeout, env={**os.environ, **environment}, stdin=subprocess.DEVNULL
    )


@pytest.fixture(scope="session")
def bigbench_tasks() -> None:
    """Extract the tasks that tests read to the cache, in one scan of the BIG-bench archive (from PyPI)."""
    from generation.sources import bigbench

    bigbench.load_tasks(BIGBENCH_TASKS)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Start a SeaweedFS S3 server with new credentials; yield the environment variables of a client."""
    attempts = 5
    for attempt in range(attempts):
        folder = tmp_path_factory.mktemp("s3")
        server, environment = _start_s3(folder)
        try:
            _wait_for_s3(environment, server, folder / "server.log")
            break
        except RuntimeError as error:
            server.kill()
            server.wait()
            # Another process can take one of the ports between the check and the start of the server.
            if attempt == attempts - 1 or "Port allocation failed" not in str(error):
                raise
    try:
        yield environment
    finally:
        # An orderly stop takes ten seconds and only saves files that are deleted with the folder.
        server.kill()
        server.wait()


def _start_s3(folder: Path) -> tuple[subprocess.Popen[bytes], dict[str, str]]:
    # Ports that neither the system gives to connections (from 32768) nor Ray to its workers (10002 to 19999).
    # The server also listens 10,000 above each port.
    base = next(
        port
        for port in iter(lambda: 20_000 + secrets.randbelow(2_700), None)
        if all(ports.is_free("127.0.0.1", port + step) for step in (*range(5), *range(10_000, 10_005)))
    )
    environment = {
        "AWS_ACCESS_KEY_ID": "test-" + uuid.uuid4().hex[:8],
        "AWS_SECRET_ACCESS_KEY": uuid.uuid4().hex,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{base}",
        "AWS_REGION": "us-east-1",
    }
    command = [
        *(shutil.which("weed", path=str(Path(sys.executable).parent)) or "weed", "mini", f"-dir={folder}", "-ip=127.0.0.1"),
        *("-ip.bind=127.0.0.1", f"-s3.port={base}", f"-master.port={base + 1}", f"-volume.port={base + 2}", f"-filer.port={base + 3}"),
        *(f"-admin.port={base + 4}", "-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false"),
        *("-master.volumeSizeLimitMB=64", "-volume.max=200"),
    ]
    with (folder / "server.log").open("w") as log:
        return subprocess.Popen(command, env={**os.environ, **environment, "HOME": str(folder)}, stdout=log, stderr=log), environment


def _wait_for_s3(environment: dict[str, str], server: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the server accepts a conditional PUT and rejects the same PUT the second time."""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        region_name=environment["AWS_REGION"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        try:
            client.create_bucket(Bucket="ready")
            client.put_object(Bucket="ready", Key=uuid.uuid4().hex, Body=b"", IfNoneMatch="*")
            key = uuid.uuid4().hex
            client.put_object(Bucket="ready", Key=key, Body=b"", IfNoneMatch="*")
            try:
                client.put_object(Bucket="ready", Key=key, Body=b"", IfNoneMatch="*")
            except ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] == 412:
                    return
        except (BotoCoreError, ClientError):
            time.sleep(0.5)
    raise RuntimeError(f"the S3 server did not start within 60 s: {log.read_text()[-2000:]}")


_ray = ExitStack()
atexit.register(_ray.close)


@pytest.fixture(scope="module")
def ray_here(s3_server: dict[str, str]) -> None:
    """Start an embedded Ray whose workers can use the S3 server and one thread each. It runs until `no_ray` or the last test."""
    import ray

    from cluster.runtime import ray_session

    if not ray.is_initialized():
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**s3_server, "OMP_NUM_THREADS": "1"}.items():
                patch.setenv(name, value)
            _ray.enter_context(ray_session())


@pytest.fixture
def no_ray() -> None:
    """Stop the embedded Ray, for a test that starts its own."""
    _ray.close()


@pytest.fixture
def bucket(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Create an empty bucket on the S3 server, set up access from this process, and return `s3://name`."""
    import boto3

    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    name = f"test-{uuid.uuid4().hex[:12]}"
    boto3.client("s3", region_name="us-east-1").create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return a folder to write to: on disk, or in object storage for the indirect parameter "s3"."""
    return str(request.getfixturevalue("bucket")) + "/place" if request.param == "s3" else str(tmp_path / "place")


class SmallDisk:
    """A mounted filesystem of 256 KiB that a test can fill."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self) -> None:
        """Write a file until the disk is full."""
        with suppress(OSError), (self.folder / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def free(self) -> None:
        (self.folder / "filler").unlink()

    def files(self) -> list[str]:
        found = [path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()]
        return sorted(name for name in found if name != "filler")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """Mount a tmpfs of 256 KiB for the test."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
