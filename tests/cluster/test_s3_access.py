"""Object storage of other people: prefix-scoped credentials, public buckets, AWS config files, throttling and encodings."""

from __future__ import annotations

import gzip
import hashlib
import os
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from cluster import copying, s3, s3_session, storage
from cluster.errors import CappyError
from generation.dataset import RegressionSet
from generation.sources import files
from tests.faults import ACCESS_DENIED, FaultyProxy, KeyStore
from tests.generation.made_set import publish


@pytest.fixture
def no_credentials(monkeypatch, tmp_path):
    """No AWS settings, neither in the environment nor in files nor from a role."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def only_below(prefix):
    """Deny requests as AWS does for credentials of one prefix: HeadBucket, listings and objects outside it."""

    def answer(method, path):
        target = urlsplit(path)
        key = unquote(target.path).removeprefix("/").partition("/")[2]
        listed = parse_qs(target.query).get("prefix", [""])[0]
        allowed = key.startswith(prefix) if key else listed.startswith(prefix)
        return None if allowed else (403, ACCESS_DENIED)

    return answer


def test_credentials_of_one_prefix_are_enough(bucket, tmp_path, monkeypatch):
    publish(f"{tmp_path}/set")
    with FaultyProxy(os.environ["AWS_ENDPOINT_URL"], answer=only_below("team/"), missing=403) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        place = storage.check_uri(f"{bucket}/team/set", "dataset")
        assert not storage.is_file(f"{place}/_MANIFEST.json") and storage.version(f"{place}/x") is None and not storage.exists(place)
        with pytest.raises(FileNotFoundError):
            storage.read_bytes(f"{place}/x")
        copying.copy_folder(f"{tmp_path}/set", place)
        assert len(RegressionSet(place).to_pandas()) == 10
        copying.copy_folder(place, f"{tmp_path}/back")
        for other in (f"{bucket}/elsewhere", bucket):
            with pytest.raises(
                CappyError, match=rf"dataset={other}: the object store at .* denied access; check the permissions"
            ) as caught:
                storage.check_uri(other, "dataset")
            assert "\n" not in str(caught.value)
        with pytest.raises(CappyError, match="denied access"):
            storage.read_bytes(f"{bucket}/elsewhere/x")


def test_credentials_that_can_only_read_one_object_are_enough_for_a_source(bucket, monkeypatch):
    storage.write_bytes(f"{bucket}/a/rows.jsonl", b'{"x": 1}\n')

    def answer(method, path):
        return None if urlsplit(path).path.endswith("/a/rows.jsonl") else (403, ACCESS_DENIED)

    with FaultyProxy(os.environ["AWS_ENDPOINT_URL"], answer=answer) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        uri = storage.check_uri(f"{bucket}/a/rows.jsonl", "source.path")
        assert storage.is_file(uri) and storage.read_bytes(uri) == b'{"x": 1}\n'


def test_a_public_bucket_is_read_without_credentials(no_credentials, tmp_path, monkeypatch):
    publish(f"{tmp_path}/set")
    objects = {f"set/{name}": storage.read_bytes(f"{tmp_path}/set/{name}") for name in storage.list_files(f"{tmp_path}/set")}
    with KeyStore(objects, public=True) as store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
        assert len(RegressionSet("s3://public/set").to_pandas()) == 10
        copying.copy_folder("s3://public/set", f"{tmp_path}/copy")
        assert set(store.signed) == {False}


def test_a_private_bucket_without_credentials_names_the_variables(no_credentials, bucket_url, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket_url)
    with pytest.raises(
        CappyError, match=r"source.path=s3://b/x: .* refused an anonymous request, .* set AWS_ACCESS_KEY_ID and .*AWS_PROFILE"
    ):
        storage.check_uri("s3://b/x", "source.path")


@pytest.fixture
def bucket_url(s3_server):
    return s3_server["AWS_ENDPOINT_URL"]


@pytest.mark.parametrize("style", ["profile", "services"])
def test_endpoint_region_and_keys_come_from_the_profile(style, bucket, no_credentials, s3_server, monkeypatch):
    for name in s3_server:
        monkeypatch.delenv(name, raising=False)
    folder = no_credentials / ".aws"
    folder.mkdir()
    endpoint = f"endpoint_url = {s3_server['AWS_ENDPOINT_URL']}"
    services = f"services = mine\n[services mine]\ns3 =\n  {endpoint}"
    config = f"[profile lab]\nregion = eu-lab-1\n{endpoint if style == 'profile' else services}\n"
    (folder / "config").write_text(config)
    keys = f"aws_access_key_id = {s3_server['AWS_ACCESS_KEY_ID']}\naws_secret_access_key = {s3_server['AWS_SECRET_ACCESS_KEY']}"
    (folder / "credentials").write_text(f"[lab]\n{keys}\n")
    monkeypatch.setenv("AWS_PROFILE", "lab")
    client = s3_session.s3_client()
    assert (client.meta.region_name, client.meta.endpoint_url) == ("eu-lab-1", s3_server["AWS_ENDPOINT_URL"])
    assert s3_session.endpoint_hint() == f" at {s3_server['AWS_ENDPOINT_URL']}"
    uri = storage.check_uri(f"{bucket}/x", "dataset")
    storage.write_bytes(uri, b"through the profile")
    fs, path = storage.filesystem(uri)
    assert fs.region == "eu-lab-1" and fs.open_input_stream(path).read() == b"through the profile"
    monkeypatch.setenv("AWS_REGION", "us-other-1")  # the environment is stronger
    assert s3_session.s3_client().meta.region_name == "us-other-1"


def test_the_endpoint_of_aws_is_left_to_the_libraries(no_credentials):
    for region in ("us-east-1", "eu-central-1", "cn-north-1"):
        os.environ["AWS_REGION"] = region
        try:
            assert s3_session.endpoint_hint() == "" and storage.filesystem("s3://b")[0].region == region
        finally:
            del os.environ["AWS_REGION"]


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("AWS_PROFILE", "nobody", r"the AWS settings cannot be used \(.*nobody.*\); check AWS_PROFILE=nobody"),
        ("AWS_ACCESS_KEY_ID", "half", r"the AWS settings cannot be used \(Partial credentials"),
        ("AWS_ENDPOINT_URL", "minio:9000", r"the endpoint of S3 is not a URL \(.*minio:9000.*\); check AWS_ENDPOINT_URL"),
    ],
)
def test_aws_settings_that_cannot_be_used_are_one_line(name, value, error, no_credentials, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(CappyError, match=error) as caught:
        storage.check_uri("s3://b/x", "dataset")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("dataset=s3://b/x: the ")


@pytest.mark.parametrize(
    ("status", "code"),
    [
        *((409, "OperationAborted"), (409, "ConditionalRequestConflict"), (429, "TooManyRequests"), (503, "SlowDown")),
        *((400, "ThrottlingException"), (403, "RequestLimitExceeded"), (408, "RequestTimeout"), (429, "")),
    ],
)
def test_conflicts_and_throttling_are_retried(status, code, bucket, monkeypatch):
    refused = []

    def answer(method, path):
        if len(refused) < 3:
            refused.append(path)
            return status, f"<Error><Code>{code}</Code></Error>".encode() if code else b""
        return None

    storage.write_bytes(f"{bucket}/o", b"x")
    with FaultyProxy(os.environ["AWS_ENDPOINT_URL"], answer=answer) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        assert storage.read_bytes(f"{bucket}/o") == b"x" and len(refused) == 3
        refused.clear()
        storage.write_bytes(f"{bucket}/o", b"y")
        assert len(refused) == 3 and storage.read_bytes(f"{bucket}/o") == b"y"


@pytest.mark.parametrize("call", [storage.read_bytes, storage.list_files, lambda uri: storage.write_bytes(uri, b"x")])
def test_a_wrong_signature_is_tried_twice(call, bucket, monkeypatch):
    body = b"<Error><Code>SignatureDoesNotMatch</Code></Error>"
    with FaultyProxy(os.environ["AWS_ENDPOINT_URL"], answer=lambda method, path: (403, body)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        with pytest.raises(CappyError, match="refused the credentials; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
            call(f"{bucket}/o")
        assert len(proxy.requests) == 2


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (403, "RequestTimeTooSkewed", r"refused the request, because the clock of this machine is wrong; set the clock \(error code"),
        (400, "InvalidRequest", r"refused the request; check the bucket, AWS_REGION and the permissions \(error code InvalidRequest\)"),
        (400, "ExpiredToken", r"refused the credentials; check AWS_ACCESS_KEY_ID"),
        (403, "AccessDenied", r"denied access; check the permissions of the credentials for this bucket and prefix"),
    ],
)
def test_a_refused_request_is_not_retried_and_names_the_reason(status, code, error, bucket, monkeypatch):
    body = f"<Error><Code>{code}</Code></Error>".encode()
    with FaultyProxy(os.environ["AWS_ENDPOINT_URL"], answer=lambda method, path: (status, body)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        with pytest.raises(CappyError, match=error):
            storage.write_bytes(f"{bucket}/o", b"x")
        assert len(proxy.requests) == 1


ROWS = b"".join(b'{"instruction": "say %d", "reference": "%d"}\n' % (number, number) for number in range(500))
HALVES = gzip.compress(ROWS[:1000]) + gzip.compress(ROWS[1000:])


@pytest.mark.parametrize(
    ("name", "stored", "header"),
    [
        ("rows.jsonl", gzip.compress(ROWS), "gzip"),
        ("rows.jsonl", gzip.compress(ROWS), "aws-chunked, GZIP"),
        ("rows.jsonl", HALVES, "gzip"),
        ("rows.jsonl", ROWS, "gzip"),  # the header is wrong
        ("rows.jsonl", ROWS, "utf-8"),
        ("rows.jsonl.gz", gzip.compress(ROWS), "gzip"),
        ("rows.jsonl.gz", gzip.compress(gzip.compress(ROWS)), "gzip"),
    ],
    ids=["gzip", "two encodings", "two members", "not compressed", "other header", "gz file", "gz file compressed twice"],
)
def test_an_object_with_a_content_encoding_is_read_as_its_content(name, stored, header, monkeypatch, no_credentials):
    with KeyStore({f"m/{name}": stored}, headers={"Content-Encoding": header, "ETag": f'"{hashlib.md5(stored).hexdigest()}"'}) as store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
        rows = [row for _, row in files.read_rows(f"s3://x/m/{name}")]
        assert rows == [{"instruction": f"say {number}", "reference": str(number)} for number in range(500)]
        content = gzip.compress(ROWS) if name.endswith(".gz") and header == "gzip" else ROWS
        if stored != HALVES and not name.endswith(".gz"):
            assert storage.read_bytes(f"s3://x/m/{name}") == content
            assert storage.sha256(f"s3://x/m/{name}") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("stored", "header", "error"),
    [
        (gzip.compress(ROWS)[:-20], "gzip", r"its gzip body is cut, 2 times"),
        (gzip.compress(ROWS)[:40] + b"damage" + gzip.compress(ROWS)[46:], "gzip", r"its gzip body is (damaged|cut)"),
        (b"x", "br", r"is stored with Content-Encoding: br, only gzip can be read; store it without an encoding"),
        (b"x", "zstd", r"is stored with Content-Encoding: zstd"),
    ],
)
def test_an_encoding_that_cannot_be_read_is_one_line(stored, header, error, monkeypatch, no_credentials):
    monkeypatch.setattr(s3, "_ATTEMPTS", 2)
    with KeyStore({"m/rows.jsonl": stored}, headers={"Content-Encoding": header}) as store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
        with pytest.raises(CappyError, match=rf"^s3://x/m/rows.jsonl:? {error}") as caught:
            storage.read_bytes("s3://x/m/rows.jsonl")
        assert "\n" not in str(caught.value)
