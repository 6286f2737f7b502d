"""`cappy push` and `cappy pull` to and from a hub: the real huggingface_hub talks to `tests.hub_server`."""

import json
import os
import signal
import subprocess
import time

import huggingface_hub.constants
import huggingface_hub.file_download
import pytest

import cappy as api
from cluster import artifacts, hub, storage
from cluster.errors import CappyError, UsageError
from generation.combine import run_combine
from generation.dataset import RegressionSet
from tests.conftest import CAPPY, cappy
from tests.generation.made_set import publish
from tests.hub_server import READ_TOKEN, TOKEN, serve

SET = "hf://datasets/alice/tense"
SCORER = "hf://alice/scorer"
SHARD = "data/train/part-00001.parquet"


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A hub on a loopback address; the client of this process and of its child processes uses it with a token."""
    with serve() as running:
        environment = {
            "HF_ENDPOINT": running.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": TOKEN,
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        # The library reads these variables when it is imported.
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
        yield running


def publish_scorer(uri, files=("model.safetensors", "config.json")):
    for name in files:
        storage.write_bytes(f"{uri}/{name}", b'{"a": 1}' if name.endswith(".json") else os.urandom(3000))
    storage.write_bytes(f"{uri}/README.md", b"---\nlicense: apache-2.0\n---\n# A scorer\n")
    names = [*files, "README.md"]
    return artifacts.publish(uri, {"kind": "scorer", "files": artifacts.checksums(uri, names)})


def test_a_set_is_the_same_after_a_push_and_a_pull(server, tmp_path):
    manifest = publish(f"{tmp_path}/a")
    pushed = api.push(f"{tmp_path}/a", SET)
    there = server.files("datasets/alice/tense")
    assert there.keys() == {*manifest["files"], "_MANIFEST.json", ".gitattributes"}
    assert there["README.md"].startswith(b"---\nlicense: ") and server.repositories["datasets/alice/tense"].private
    assert json.loads(there["_MANIFEST.json"]) == {key: value for key, value in manifest.items() if key != "writer"}
    pulled = api.pull(SET, f"{tmp_path}/b")
    assert pulled["commit"] == pushed["commit"] and pulled["copied_files"] == len(manifest["files"])
    copy = storage.read_json(f"{tmp_path}/b/_MANIFEST.json")
    assert copy["copied_from"] == f"{SET}@{pushed['commit']}" and artifacts.verify(f"{tmp_path}/b", copy) == []
    assert set(storage.list_files(f"{tmp_path}/b")) == {*manifest["files"], "_MANIFEST.json"}
    assert RegressionSet(f"{tmp_path}/b").to_pandas().equals(RegressionSet(f"{tmp_path}/a").to_pandas())
    again = api.push(f"{tmp_path}/a", SET)
    assert (again["copied_files"], again["commit"]) == (0, pushed["commit"])
    assert api.pull(SET, f"{tmp_path}/b")["copied_files"] == 0


def test_the_command_line_prints_the_commit_and_copies_between_the_hub_and_s3(server, tmp_path, bucket):
    publish_scorer(f"{bucket}/a")
    pushed = cappy("push", f"{bucket}/a", SCORER)
    commit = server.repositories["models/alice/scorer"].branches["main"]
    assert pushed.returncode == 0 and f"scorer {SCORER}: 3 of 3 files copied" in pushed.stdout and f"commit {commit}\n" in pushed.stdout
    pulled = cappy("push", SCORER, f"{bucket}/b")
    assert pulled.returncode == 0 and f"commit {commit}" in pulled.stdout, pulled.stderr
    assert artifacts.verify(f"{bucket}/b", artifacts.read_manifest(f"{bucket}/b", "scorer", "train")) == []
    assert TOKEN not in pushed.stdout + pushed.stderr + pulled.stdout + pulled.stderr


def test_a_pinned_revision_stays_the_same_after_the_repository_moved_on(server, tmp_path):
    first = publish(f"{tmp_path}/a")
    second = publish(f"{tmp_path}/b", train=(2,))
    old = api.push(f"{tmp_path}/a", SET)["commit"]
    uploads = len([each for each in server.requests if each.startswith("PUT")])
    new = api.push(f"{tmp_path}/b", SET)
    assert new["commit"] != old
    assert server.files("datasets/alice/tense").keys() == {*second["files"], "_MANIFEST.json", ".gitattributes"}
    assert len([each for each in server.requests if each.startswith("PUT")]) == uploads + 2  # the shards, which differ
    api.pull(f"{SET}@{old}", f"{tmp_path}/old")
    api.pull(f"{SET}@main", f"{tmp_path}/new")
    assert storage.read_json(f"{tmp_path}/old/_MANIFEST.json")["files"] == first["files"]
    assert storage.read_json(f"{tmp_path}/new/_MANIFEST.json")["files"] == second["files"]


def test_a_folder_of_a_repository_and_a_branch_are_separate_places(server, tmp_path):
    publish(f"{tmp_path}/a")
    api.push(f"{tmp_path}/a", f"{SET}/one")
    api.push(f"{tmp_path}/a", f"{SET}@next/two")
    assert {name.split("/")[0] for name in server.files("datasets/alice/tense")} == {"one", ".gitattributes"}
    assert api.pull(f"{SET}@next/two", f"{tmp_path}/b")["files"] == api.pull(f"{SET}/one", f"{tmp_path}/c")["files"]


def test_a_killed_push_shows_nothing_and_the_same_command_resumes(server, tmp_path):
    names = [f"part-{number:03d}.bin.safetensors" for number in range(60)]
    publish_scorer(f"{tmp_path}/a", names)
    server.before_upload = type(server.before_upload)(10)
    push = subprocess.Popen([*CAPPY, "push", f"{tmp_path}/a", SCORER], stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and len(server.objects) < 10:
        assert push.poll() is None, push.stderr.read()
        time.sleep(0.01)
    os.killpg(push.pid, signal.SIGKILL)
    push.communicate()
    assert server.files("models/alice/scorer").keys() == {".gitattributes"}
    with pytest.raises(CappyError, match=r"has no _MANIFEST.json, so `cappy push` did not write it"):
        api.pull(SCORER, f"{tmp_path}/b")
    server.before_upload.release(10**6)
    before = len([each for each in server.requests if each.startswith("PUT")])
    api.push(f"{tmp_path}/a", SCORER)
    assert len([each for each in server.requests if each.startswith("PUT")]) - before <= 50
    assert server.files("models/alice/scorer").keys() == {*names, "README.md", "_MANIFEST.json", ".gitattributes"}


def test_a_damaged_download_is_read_again_and_a_damaged_repository_is_refused(server, tmp_path):
    publish(f"{tmp_path}/a")
    api.push(f"{tmp_path}/a", SET)
    server.damage[SHARD] = 1
    api.pull(SET, f"{tmp_path}/b")
    assert artifacts.verify(f"{tmp_path}/b", storage.read_json(f"{tmp_path}/b/_MANIFEST.json")) == []
    server.damage[SHARD] = 10
    with pytest.raises(CappyError, match=rf"{SHARD} does not match its SHA-256, read 3 times; nothing is published"):
        api.pull(SET, f"{tmp_path}/c")
    assert not storage.exists(f"{tmp_path}/c/_MANIFEST.json")
    server.damage.clear()
    assert 0 < api.pull(SET, f"{tmp_path}/c")["copied_files"] < 7


def test_a_combined_set_is_pushed_with_its_shards_and_a_repository_that_names_other_files_is_refused(server, tmp_path):
    one, two, both = (f"{tmp_path}/{name}" for name in ("one", "two", "both"))
    publish(one)
    publish(two, first=1000)
    run_combine([one, two], both)
    api.push(both, SET)
    assert len([name for name in server.files("datasets/alice/tense") if name.startswith("data/")]) == 6
    api.pull(SET, f"{tmp_path}/pulled")
    assert RegressionSet(f"{tmp_path}/pulled").to_pandas().equals(RegressionSet(both).to_pandas())
    tree = server.files("datasets/alice/tense")
    harmful = json.loads(tree["_MANIFEST.json"])
    harmful["files"][SHARD]["uri"] = f"{one}/{SHARD}"
    server.repositories["datasets/alice/tense"].add_commit("main", {**tree, "_MANIFEST.json": json.dumps(harmful).encode()})
    with pytest.raises(CappyError, match="refers to files of other folders, so `cappy push` did not write it; do not use it"):
        api.pull(SET, f"{tmp_path}/harmful")
    assert not storage.exists(f"{tmp_path}/harmful")


def test_a_damaged_source_commits_nothing(server, tmp_path):
    publish(f"{tmp_path}/a")
    storage.write_bytes(f"{tmp_path}/a/{SHARD}", b"PAR1")
    with pytest.raises(CappyError, match=rf"{SHARD} does not match its SHA-256; nothing is committed"):
        api.push(f"{tmp_path}/a", SET)
    assert server.files("datasets/alice/tense").keys() == {".gitattributes"}


def test_pickled_files_are_neither_pushed_nor_pulled(server, tmp_path):
    publish_scorer(f"{tmp_path}/a", ["pytorch_model.bin"])
    with pytest.raises(CappyError, match=r"has the pickled file pytorch_model.bin, which can run code"):
        api.push(f"{tmp_path}/a", SCORER)
    assert server.repositories == {}
    publish_scorer(f"{tmp_path}/b")
    api.push(f"{tmp_path}/b", SCORER)
    found = server.repositories["models/alice/scorer"]
    tree = dict(server.files("models/alice/scorer"))
    found.add_commit("main", {**tree, "pytorch_model.bin": b"x"})  # beside the pushed files, and not in their manifest
    assert api.pull(SCORER, f"{tmp_path}/c")["files"] == 3 and not storage.exists(f"{tmp_path}/c/pytorch_model.bin")
    manifest = json.loads(tree["_MANIFEST.json"])
    manifest["files"]["pytorch_model.bin"] = {"bytes": 1, "sha256": "0"}
    found.add_commit("main", {**tree, "_MANIFEST.json": json.dumps(manifest).encode()})
    with pytest.raises(CappyError, match=r"has the pickled file pytorch_model.bin"):
        api.pull(SCORER, f"{tmp_path}/d")


def test_a_place_of_another_kind_or_with_other_files_is_not_touched(server, tmp_path):
    publish(f"{tmp_path}/set")
    publish_scorer(f"{tmp_path}/scorer")
    with pytest.raises(UsageError, match=r"is a model repository, and SRC holds a dataset; write hf://datasets/alice/tense"):
        api.push(f"{tmp_path}/set", "hf://alice/tense")
    with pytest.raises(UsageError, match=r"is a dataset repository, and SRC holds a scorer; write hf://alice/tense"):
        api.push(f"{tmp_path}/scorer", SET)
    api.push(f"{tmp_path}/set", f"{SET}/one")
    with pytest.raises(UsageError, match=r"holds other files, one/README.md first of 8; choose another repository, or a path in it"):
        api.push(f"{tmp_path}/set", SET)
    commit = server.repositories["datasets/alice/tense"].branches["main"]
    with pytest.raises(UsageError, match="names a commit, which never changes; give a branch"):
        api.push(f"{tmp_path}/set", f"{SET}@{commit}")


@pytest.mark.parametrize(
    ("part", "status", "code", "message"),
    [
        ("/api/datasets/alice/tense", 401, "RepoNotFound", "there is no such dataset repository, or it is private; check the name"),
        ("/revision/", 404, "RevisionNotFound", "the repository has no revision v2; give a commit, tag or branch of it"),
        ("/api/datasets/alice/tense", 403, "GatedRepo", "access to the repository must be requested on its page"),
        ("/api/datasets/alice/tense", 503, "", "the hub answered 503; run the same command again later"),
    ],
)
def test_an_error_of_a_pull_is_one_line_with_the_fix(server, tmp_path, part, status, code, message):
    server.fail[part] = (status, code)
    with pytest.raises(CappyError) as error:
        api.pull(f"{SET}@v2", f"{tmp_path}/b")
    assert str(error.value).startswith(f"SRC={SET}@v2: {message}") and "\n" not in str(error.value)
    assert not storage.exists(f"{tmp_path}/b")


def test_a_push_without_rights_or_after_another_push_commits_nothing_and_prints_no_token(server, tmp_path, monkeypatch):
    publish(f"{tmp_path}/a")
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    result = cappy("push", f"{tmp_path}/a", SET)
    assert result.returncode == 1 and f"DST={SET}: the token has no right to do this; set HF_TOKEN" in result.stderr
    assert READ_TOKEN not in result.stdout + result.stderr and server.repositories == {}
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    server.fail["/commit/"] = (412, "")
    with pytest.raises(CappyError, match=r"another push changed the repository meanwhile, so nothing was committed; run the same command"):
        api.push(f"{tmp_path}/a", SET)
    assert server.files("datasets/alice/tense").keys() == {".gitattributes"}


def test_without_a_network_or_with_offline_mode_the_error_names_the_fix(server, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CappyError, match=r"http://127.0.0.1:9 cannot be reached; check the network and HF_ENDPOINT"):
        api.pull(SET, f"{tmp_path}/b")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CappyError, match="HF_HUB_OFFLINE=1 forbids requests to the hub; unset it"):
        api.pull(SET, f"{tmp_path}/b")


@pytest.mark.parametrize("uri", ["hf://datasets/alice", "hf://alice", "hf://spaces/alice/x", "hf://datasets/a/b@", "hf://datasets/a b/c"])
def test_an_invalid_address_is_refused(uri):
    with pytest.raises(UsageError, match=r"is not an address on the hub; write hf://datasets/owner/name"):
        hub.parse(uri, "SRC")


def test_addresses_have_a_revision_and_a_path():
    parsed = hub.parse("hf://datasets/a/b@refs/pr/1/x/y/", "SRC")
    assert (parsed.revision, parsed.path, parsed.folder_name, parsed.uri) == ("refs/pr/1", "x/y", "y", "hf://datasets/a/b@refs/pr/1/x/y")
    assert hub.parse("hf://a/b@v1.0", "SRC").folder_name == "b"
    with pytest.raises(CappyError, match="not within the folder"):
        hub.parse("hf://datasets/a/b/../c", "SRC")


def test_other_verbs_name_the_command_that_copies_from_the_hub(tmp_path):
    for arguments in (["serve", "--set", f"scorer_path={SCORER}"], ["answer", "--set", f"source={{kind: files, path: {SET}}}"]):
        result = cappy(*arguments, "--set", f"workspace={tmp_path}")
        assert result.returncode == 2 and "only `cappy push` and `cappy pull` read and write the hub" in result.stderr
    with pytest.raises(UsageError, match=rf"DST={SET}: only `cappy push` and `cappy pull` read and write the hub"):
        api.push(str(tmp_path), SET, pairs=True)
    with pytest.raises(UsageError, match=r"is not on this machine; copy between stores with `cappy push"):
        api.pull("s3://a/b", SET)
