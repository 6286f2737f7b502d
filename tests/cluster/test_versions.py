from __future__ import annotations

from cluster import artifacts, storage, versions
from cluster.config import Config, FilesSource, MixtureSource
from cluster.config.paths import source_files


def publish(uri):
    artifacts.publish_folder(uri, "dataset", files={}, summary={}, config={})
    return storage.read_json(f"{uri}/{artifacts.MANIFEST}")["writer"]


def test_each_publication_has_another_version_and_other_folders_have_none(tmp_path):
    uri = f"{tmp_path}/set"
    assert versions.version(uri) is None and versions.version("owner/model") is None
    first = publish(uri)
    assert versions.version(uri) == first
    storage.delete(uri)
    assert publish(uri) != first
    storage.write_bytes(f"{uri}/{artifacts.MANIFEST}", b"{")
    assert versions.version(uri) is None


def test_a_file_a_folder_and_a_glob_have_the_version_of_the_published_folder_around_them(tmp_path):
    writer = publish(f"{tmp_path}/set")
    paths = {
        "file": f"{tmp_path}/set/data/a.parquet",
        "folder": f"{tmp_path}/set/data",
        "glob": f"{tmp_path}/set/d*/*.parquet",
        "set": f"{tmp_path}/set",
    }
    assert versions.of_files({**paths, "beside": f"{tmp_path}/other/a.jsonl"}) == dict.fromkeys(paths, writer)


def test_the_files_of_a_source_have_the_names_of_their_settings():
    rows = FilesSource(path="a.jsonl", templates="t.yaml", format="promptsource")
    assert source_files(rows) == {"source.templates": "t.yaml", "source.path": "a.jsonl"}
    assert source_files(Config().source) == {}
    mixture = MixtureSource(parts=({"source": FilesSource(path="b.jsonl")},))  # type: ignore[arg-type]
    assert source_files(mixture) == {"source.parts.0.source.path": "b.jsonl"}
