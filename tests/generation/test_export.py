"""Exports of sets, answers and scores: files, manifest, card, errors, and interrupted runs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections import defaultdict

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from cluster import artifacts, copying, storage
from cluster.errors import CappyError, UsageError
from generation import export, export_pools
from generation.export import ExportOptions, run_export
from generation.export_formats import FORMATS
from serving.answer_files import answer_schema
from tests.cluster.test_copying import SHARD, endpoints, flip
from tests.conftest import CAPPY, cappy
from tests.generation.made_set import publish

__all__ = ["endpoints"]  # a fixture


def publish_table(uri, rows, kind="scores", schema=None, files=1, folder="data/train"):
    """Publish rows as the Parquet files of a folder of another verb."""
    size = -(-len(rows) // files)
    made = {}
    for number in range(files):
        name = f"{folder}/part-{number:05d}-0123abcd.parquet"
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows[number * size : (number + 1) * size], schema), sink)
        made[name] = storage.write_bytes(storage.join(uri, name), sink.getvalue().to_pybytes())
    artifacts.publish_folder(uri, kind, files=made, summary={}, config={})


def read(uri, split="train"):
    """Return the rows of a split of an export, sorted."""
    names = sorted(name for name in storage.list_files(uri) if name.startswith(f"data/{split}/"))
    rows = []
    for name in names:
        data = storage.read_bytes(storage.join(uri, name))
        rows += map(json.loads, data.splitlines()) if name.endswith("jsonl") else pq.read_table(pa.BufferReader(data)).to_pylist()
    return sorted(rows, key=lambda row: json.dumps(row, sort_keys=True))


def by_prompt(rows, *columns):
    found = defaultdict(list)
    for row in rows:
        found[row["prompt"]].append(tuple(row[name] for name in columns))
    return found


SCORES = [
    {"instruction": "say a", "response": "a", "score": 0.9},
    {"instruction": "say b", "response": "x", "score": 0.4},
    {"instruction": "say a", "response": "b", "score": 0.1},
    {"instruction": "say a", "response": "a", "score": 0.9},
    {"instruction": "say b", "response": "b", "score": 0.7},
    {"instruction": "say b", "response": "x", "score": 0.8},
]


@pytest.mark.parametrize("form", FORMATS)
def test_each_format_of_a_set_is_published_with_a_card_and_a_manifest(form, endpoints):
    source, destination = endpoints
    publish(source)
    summary = run_export(source, destination, ExportOptions(form))
    manifest = artifacts.read_manifest(destination, "export", "export")
    assert artifacts.verify(destination, manifest) == []
    assert set(storage.list_files(destination)) == {*manifest["files"], "_MANIFEST.json"}
    train, validation = read(destination), read(destination, "validation")
    assert summary["splits"] == {"train": len(train), "validation": len(validation)} and len(validation) in (3, 9, 12, 15, 18)
    assert summary["instructions"] == 13 and summary["candidates"] == 91 and not summary["kept"]
    assert all(list(row) == list(manifest["schema"]) for row in train)
    card = storage.read_bytes(f"{destination}/README.md").decode()
    header = yaml.safe_load(card.split("---")[1])
    assert header["configs"][0]["data_files"][0]["path"].startswith("data/train/part-*.")
    assert f"cappy export {source} DST --as {form}" in card and f"{summary['rows']:,} rows from 13 instructions" in card


def test_a_completion_is_the_best_sampled_response_unless_other_sources_are_named(tmp_path):
    publish(f"{tmp_path}/set", train=(2,), validation=())
    run_export(f"{tmp_path}/set", f"{tmp_path}/sft", ExportOptions("sft"))
    assert [row["completion"] for row in read(f"{tmp_path}/sft")] == ["right 0", "right 1"]
    options = ExportOptions("sft", sources=("mismatched",))
    run_export(f"{tmp_path}/set", f"{tmp_path}/wrong", options)
    # "right 1" is the mismatched reference of the first instruction.
    assert [row["completion"] for row in read(f"{tmp_path}/wrong")] == ["right 1", "right 2"]
    run_export(f"{tmp_path}/set", f"{tmp_path}/logprob", ExportOptions("sft", by="logprob"))
    assert [row["completion"] for row in read(f"{tmp_path}/logprob")] == ["sample 0.0"] * 2  # equal: the first


def test_preferences_of_a_set_have_the_margin_of_the_labels(tmp_path):
    publish(f"{tmp_path}/set", train=(2,), validation=())
    run_export(f"{tmp_path}/set", f"{tmp_path}/dpo", ExportOptions("dpo", per_instruction=3, margin=0.5))
    first = by_prompt(read(f"{tmp_path}/dpo"), "chosen", "rejected", "margin")["say right 0, please: ñandú"]
    assert sorted(first, key=lambda pair: -pair[2]) == [
        ("right 0", "sample 0.0", 1.0),
        ("right 0", "sample 0.05", pytest.approx(0.95)),
        ("right 0", "sample 0.3", pytest.approx(0.7)),
    ]


def test_scores_are_grouped_by_prompt_and_contradictions_are_left_out(tmp_path):
    publish_table(f"{tmp_path}/scores", SCORES, files=3)
    summary = run_export(f"{tmp_path}/scores", f"{tmp_path}/pairs", ExportOptions("pairs"))
    assert [tuple(row.values()) for row in read(f"{tmp_path}/pairs")] == [("say a", "b", 0.1), ("say a", "a", 0.9), ("say b", "b", 0.7)]
    assert summary["by"] == "score" and summary["left_out"] | {"repeated": 2, "contradicting": 1} == summary["left_out"]
    summary = run_export(f"{tmp_path}/scores", f"{tmp_path}/dpo", ExportOptions("dpo"))
    assert [tuple(row.values()) for row in read(f"{tmp_path}/dpo")] == [("say a", "a", "b", 0.8)]
    assert summary["left_out"]["instructions_left_out"] == 1


def test_answers_are_read_with_and_without_their_pool(tmp_path):
    pool = [{"response": "a", "score": 0.9, "tokens": 1}, {"response": "b", "score": 0.1, "tokens": 1}]
    rows = [
        {"id": "1", "instruction": "say a", "response": "a", "score": 0.9, "label": "spam", "candidates": pool},
        {"id": "2", "instruction": "say c", "response": "c", "score": 0.8, "label": "ham", "candidates": None},
        {"id": "3", "instruction": "say d", "response": None, "score": None, "label": "ham", "candidates": pool[1:]},
        {"id": "4", "instruction": "say e", "response": "b", "score": 0.1, "label": "ham", "candidates": pool},
        {"id": "5", "instruction": "say f", "response": "f", "score": None, "label": "ham", "candidates": []},
    ]
    publish_table(f"{tmp_path}/answers", rows, "answers", folder="data/answers")
    summary = run_export(f"{tmp_path}/answers", f"{tmp_path}/sft", ExportOptions("sft"))
    chosen = [tuple(row.values()) for row in read(f"{tmp_path}/sft")]
    assert sorted(chosen) == [("say a", "a"), ("say c", "c"), ("say e", "b"), ("say f", "f")]  # the selected answers
    assert summary["left_out"]["empty"] == 1 and summary["splits"] == {"train": 4}
    run_export(f"{tmp_path}/answers", f"{tmp_path}/by", ExportOptions("sft", by="score"))
    assert {tuple(row.values()) for row in read(f"{tmp_path}/by")} == {("say a", "a"), ("say c", "c"), ("say d", "b"), ("say e", "a")} | {
        ("say f", "f")
    }
    run_export(f"{tmp_path}/answers", f"{tmp_path}/dpo", ExportOptions("dpo"))
    assert [row["rejected"] for row in read(f"{tmp_path}/dpo")] == ["b", "b"]
    publish_table(f"{tmp_path}/alone", [{key: row[key] for key in row if key != "candidates"} for row in rows], "answers")
    run_export(f"{tmp_path}/alone", f"{tmp_path}/alone-sft", ExportOptions("sft", threshold=0.85))
    assert [row["completion"] for row in read(f"{tmp_path}/alone-sft")] == ["a"]


def test_a_table_of_pairs_and_one_without_scores_are_sources_too(tmp_path):
    publish(f"{tmp_path}/set")
    run_export(f"{tmp_path}/set", f"{tmp_path}/table", ExportOptions("pairs", duplicates=True))
    for source in ("set", "table"):
        run_export(f"{tmp_path}/{source}", f"{tmp_path}/{source}-kto", ExportOptions("kto"))
    assert read(f"{tmp_path}/set-kto") == read(f"{tmp_path}/table-kto") != []
    publish_table(f"{tmp_path}/plain", [{"question": "say a", "answer": "a"}, {"question": "say a", "answer": "b"}])
    summary = run_export(f"{tmp_path}/plain", f"{tmp_path}/sft", ExportOptions("sft", prompt="question", response="answer"))
    assert read(f"{tmp_path}/sft") == [{"prompt": "say a", "completion": "a"}] and summary["by"] is None


def test_messages_and_a_system_message_are_written(tmp_path):
    publish_table(f"{tmp_path}/scores", SCORES)
    run_export(f"{tmp_path}/scores", f"{tmp_path}/dpo", ExportOptions("dpo", messages=True, system="Be brief."))
    (row,) = read(f"{tmp_path}/dpo")
    assert row["prompt"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "say a"}]
    assert row["rejected"] == [{"role": "assistant", "content": "b"}]
    run_export(f"{tmp_path}/scores", f"{tmp_path}/chat", ExportOptions("chat", system="Be brief."))
    assert [each["role"] for each in read(f"{tmp_path}/chat")[0]["messages"]] == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ExportOptions("csv"), "--as=csv: no such format; choose one of sft, dpo, reward"),
        (ExportOptions("sft", margin=0.1), "--margin=0.1 is for dpo, reward, kto, ranking; leave it out for --as=sft"),
        (ExportOptions("dpo", threshold=0.1), "--threshold=0.1 is for sft, kto, chat; leave it out for --as=dpo"),
        (ExportOptions("dpo", margin=-1), "--margin=-1: give at least 0"),
        (ExportOptions("sft", threshold=float("nan")), "--threshold=nan: give a number"),
        (ExportOptions("dpo", per_instruction=0), "--per-instruction=0: give at least 1"),
        (ExportOptions("ranking", per_instruction=1), "--per-instruction=1: give at least 2"),
        (ExportOptions("dpo", sources=("llm",)), "--source=llm: no such source of responses; choose from reference, choice"),
        (ExportOptions("chat", messages=True), "--messages is for sft, dpo, reward, kto; leave it out for --as=chat"),
        (ExportOptions("dpo", system="x"), "--system needs a format of messages: --as=chat, or --messages"),
        (ExportOptions("dpo", duplicates=True), "--duplicates publishes all pairs of a regression set"),
        (ExportOptions("dpo", by="score"), r"--by=score: SRC=\S+ has no such column; it has id, .*of a candidate: response, label, source"),
        (ExportOptions("dpo", by="decoding"), r"--by=decoding: this column of SRC=\S+ is string, not a number"),
        (ExportOptions("dpo", prompt="question"), r"--prompt=question: SRC=\S+ has no such column; it has id, dataset"),
        (ExportOptions("dpo", prompt="references"), r"--prompt=references: this column of SRC=\S+ is list<.*>, not a text"),
        (ExportOptions("dpo", margin=1.5), r"no row is left for --as=dpo with --margin=1.5: the largest margin of label is 1; lower it"),
        (ExportOptions("kto", sources=("mismatched",), threshold=0, margin=0.1), None),
        (ExportOptions("kto", margin=1.5), None),
        (ExportOptions("kto", sources=("mismatched",), margin=0.7), r"with --margin=0.7: the largest margin of label is 0.5; lower it"),
        (ExportOptions("sft", threshold=2), r"no row is left for --as=sft with --threshold=2: the largest label is 1; lower it"),
        (ExportOptions("dpo", sources=("mismatched",)), "no instruction has two responses with different values of label"),
        (ExportOptions("sft", sources=("choice",)), r"of source choice; it has mismatched 13, reference 13, sampled 65: choose with"),
    ],
)
def test_an_export_that_cannot_be_made_is_one_line_with_the_reason_and_the_contents(options, message, tmp_path):
    publish(f"{tmp_path}/set")
    if message is None:
        run_export(f"{tmp_path}/set", f"{tmp_path}/out", options)  # the desirable responses stay
        assert all(row["label"] for row in read(f"{tmp_path}/out"))
        return
    with pytest.raises(UsageError, match=message) as error:
        run_export(f"{tmp_path}/set", f"{tmp_path}/out", options)
    assert "\n" not in str(error.value)
    assert storage.list_files(f"{tmp_path}/out") == {}


def test_a_source_without_scores_or_rows_is_an_error(tmp_path):
    publish_table(f"{tmp_path}/plain", [{"instruction": "say a", "response": "a"}])
    with pytest.raises(UsageError, match=r"SRC=\S+ has no scores: no column score or label with numbers; it has instruction, response;"):
        run_export(f"{tmp_path}/plain", f"{tmp_path}/out", ExportOptions("dpo"))
    with pytest.raises(UsageError, match=r"has no scores"):
        run_export(f"{tmp_path}/plain", f"{tmp_path}/out", ExportOptions("sft", threshold=0.5))
    publish_table(
        f"{tmp_path}/null",
        [{"instruction": "say a", "response": "a", "score": None}],
        schema=pa.schema([("instruction", pa.string()), ("response", pa.string()), ("score", pa.float32())]),
    )
    with pytest.raises(UsageError, match=r"all 1 candidates are left out \(without_value 1\)"):
        run_export(f"{tmp_path}/null", f"{tmp_path}/out", ExportOptions("dpo"))
    artifacts.publish_folder(f"{tmp_path}/scorer", "scorer", files={}, summary={}, config={})
    with pytest.raises(UsageError, match=r"holds a scorer without Parquet files; give a regression set, answers or scores"):
        run_export(f"{tmp_path}/scorer", f"{tmp_path}/out", ExportOptions("dpo"))
    with pytest.raises(CappyError, match=r"SRC=\S+/none has no readable _MANIFEST.json"):
        run_export(f"{tmp_path}/none", f"{tmp_path}/out", ExportOptions("dpo"))


def test_the_same_export_is_kept_another_one_is_refused_and_overwrite_replaces_it(endpoints):
    source, destination = endpoints
    publish(source)
    first = run_export(source, destination, ExportOptions("dpo", margin=0.5))
    written = storage.read_json(f"{destination}/_MANIFEST.json")["writer"]
    assert run_export(source, destination, ExportOptions("dpo", margin=0.5)) == first | {"kept": True}
    with pytest.raises(UsageError, match=r"already holds a finished run; .*`cappy export --overwrite`"):
        run_export(source, destination, ExportOptions("dpo"))
    assert storage.read_json(f"{destination}/_MANIFEST.json")["writer"] == written
    run_export(source, destination, ExportOptions("chat"), overwrite=True)
    assert set(storage.list_files(destination)) == {
        "_MANIFEST.json",
        "README.md",
        "data/train/part-00000.jsonl",
        "data/validation/part-00000.jsonl",
    }
    pairs = ExportOptions("pairs", duplicates=True)
    with pytest.raises(UsageError, match=r"holds an export, not pairs; nothing was deleted"):
        run_export(source, destination, pairs, overwrite=True)


def test_all_pairs_are_those_of_push_and_are_overwritten(tmp_path):
    publish(f"{tmp_path}/set")
    pairs = ExportOptions("pairs", duplicates=True)
    assert run_export(f"{tmp_path}/set", f"{tmp_path}/a", pairs)["kind"] == "pairs"
    assert run_export(f"{tmp_path}/set", f"{tmp_path}/a", pairs)["copied_files"] == 0
    assert run_export(f"{tmp_path}/set", f"{tmp_path}/a", pairs, overwrite=True)["copied_files"] == 3
    export.export_pairs.export_pairs(f"{tmp_path}/set", f"{tmp_path}/b")
    assert read(f"{tmp_path}/a") == read(f"{tmp_path}/b") and len(read(f"{tmp_path}/a")) == 70


def test_overwrite_leaves_files_of_others(tmp_path):
    publish(f"{tmp_path}/set")
    storage.write_bytes(f"{tmp_path}/out/data/train/part-00000.parquet", b"mine")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match=r"holds files that no `cappy export` wrote, e\.g\. data/train/part-00000.parquet"):
            run_export(f"{tmp_path}/set", f"{tmp_path}/out", ExportOptions("dpo"), overwrite=overwrite)
    assert storage.read_bytes(f"{tmp_path}/out/data/train/part-00000.parquet") == b"mine"
    with pytest.raises(UsageError, match="are the same folder or one is in the other"):
        run_export(f"{tmp_path}/set", f"{tmp_path}/set/dpo", ExportOptions("dpo"))


@pytest.mark.parametrize("form", ["dpo", "chat"])
@pytest.mark.parametrize("writes", [0, 1, 3])
def test_an_interrupted_export_ends_with_the_files_of_an_unbroken_one(writes, form, endpoints, monkeypatch):
    source, destination = endpoints
    monkeypatch.setattr(export_pools, "FILE_BYTES", 1000)
    publish(source, train=(30,), validation=(5,))
    run_export(source, f"{destination}-whole", ExportOptions(form))
    whole = artifacts.read_any_manifest(f"{destination}-whole", "DST")["files"]
    real, done = copying.CopySession.place, []

    def stop(session, file, name):
        if len(done) == writes:
            raise KeyboardInterrupt
        done.append(name)
        real(session, file, name)

    monkeypatch.setattr(copying.CopySession, "place", stop)
    with pytest.raises(KeyboardInterrupt):
        run_export(source, destination, ExportOptions(form))
    assert not storage.exists(f"{destination}/_MANIFEST.json")
    monkeypatch.setattr(copying.CopySession, "place", real)
    run_export(source, destination, ExportOptions(form))
    made = artifacts.read_any_manifest(destination, "DST")["files"]
    assert {name: made[name] for name in made if name.startswith("data/")} == {
        name: whole[name] for name in whole if name.startswith("data/")
    }
    assert len(made) > 4 and set(storage.list_files(destination)) == {*made, "_MANIFEST.json"}


def test_parts_of_an_interrupted_export_with_other_options_do_not_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(export_pools, "FILE_BYTES", 500)
    publish_table(f"{tmp_path}/scores", SCORES * 20)
    real = artifacts.publish_folder
    monkeypatch.setattr(artifacts, "publish_folder", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_export(f"{tmp_path}/scores", f"{tmp_path}/out", ExportOptions("kto"))
    assert sum(name.startswith("data/") for name in storage.list_files(f"{tmp_path}/out")) == 2
    monkeypatch.setattr(artifacts, "publish_folder", real)
    run_export(f"{tmp_path}/scores", f"{tmp_path}/out", ExportOptions("dpo"))
    assert len(read(f"{tmp_path}/out")) == 1
    assert set(storage.list_files(f"{tmp_path}/out")) == {*artifacts.read_any_manifest(f"{tmp_path}/out", "DST")["files"], "_MANIFEST.json"}


def test_a_damaged_source_is_not_exported(tmp_path):
    publish(f"{tmp_path}/set")
    flip(f"{tmp_path}/set/{SHARD}", 100)
    with pytest.raises(CappyError, match=rf"{SHARD} does not match its SHA-256"):
        run_export(f"{tmp_path}/set", f"{tmp_path}/out", ExportOptions("dpo"))
    assert not (tmp_path / "out" / "_MANIFEST.json").exists()


def test_no_secret_of_the_options_or_the_config_is_published(tmp_path):
    publish(f"{tmp_path}/set", lineage={"engine": "http://user:hidden@host/v1"})
    run_export(f"{tmp_path}/set", f"{tmp_path}/out", ExportOptions("chat", system="See https://host/x?token=hidden"))
    for name in ("_MANIFEST.json", "README.md"):
        assert "hidden" not in storage.read_bytes(f"{tmp_path}/out/{name}").decode()


def test_hugging_face_loads_an_export_by_its_card(tmp_path):
    publish(f"{tmp_path}/set")
    for form in ("dpo", "chat"):
        run_export(f"{tmp_path}/set", f"{tmp_path}/{form}", ExportOptions(form))
        opened = datasets.load_dataset(f"{tmp_path}/{form}", cache_dir=f"{tmp_path}/cache-{form}")
        assert {split: len(rows) for split, rows in opened.items()} == {"train": 10, "validation": 3}
        card = (tmp_path / form / "README.md").read_text()
        call = re.search(r"load_dataset\((.*)\)", card)[1]
        assert f'data_files="{tmp_path}/{form}/data/train/part-*.' in call


def test_the_memory_of_an_export_does_not_grow_with_the_source(tmp_path, monkeypatch):
    monkeypatch.setattr(export_pools, "FILE_BYTES", 50_000)
    monkeypatch.setattr(export_pools, "_PENDING_BYTES", 1 << 20)
    peaks = []
    for files in (2, 16):
        rows = [
            {"instruction": f"{number // 4} " + "words " * 40, "response": f"answer {number}", "score": number % 4 / 4}
            for number in range(files * 4000)
        ]
        publish_table(f"{tmp_path}/{files}", rows, files=files)
        pool = pa.proxy_memory_pool(pa.system_memory_pool())
        before = pa.default_memory_pool()
        pa.set_memory_pool(pool)
        try:
            summary = run_export(f"{tmp_path}/{files}", f"{tmp_path}/{files}-dpo", ExportOptions("dpo"))
        finally:
            pa.set_memory_pool(before)
        assert summary["rows"] == files * 1000
        peaks.append(pool.max_memory())
    assert peaks[1] < 1.5 * peaks[0], peaks


@pytest.mark.slow
def test_a_killed_export_publishes_nothing_and_the_same_command_completes_it(tmp_path):
    rows = [{"instruction": f"say {n // 4} " + "word " * 30, "response": f"answer {n}", "score": n % 4 / 4} for n in range(100_000)]
    publish_table(f"{tmp_path}/scores", rows, files=4)
    command = ["export", f"{tmp_path}/scores", f"{tmp_path}/out", "--as", "dpo", "--json"]
    running = subprocess.Popen([*CAPPY, *command], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (tmp_path / "out/_copying/prompts-train/0.arrow").exists():
        assert running.poll() is None
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    there = set(storage.list_files(f"{tmp_path}/out"))
    assert "_copying/prompts-train/0.arrow" in there and "_MANIFEST.json" not in there
    result = json.loads(cappy(*command).stdout.splitlines()[-1])
    run_export(f"{tmp_path}/scores", f"{tmp_path}/whole", ExportOptions("dpo"))
    made, whole = (artifacts.read_any_manifest(f"{tmp_path}/{name}", "DST")["files"] for name in ("out", "whole"))
    assert result["rows"] == 25_000 and made["data/train/part-00000.parquet"] == whole["data/train/part-00000.parquet"]
    assert set(storage.list_files(f"{tmp_path}/out")) == {*made, "_MANIFEST.json"}


def test_the_columns_of_published_answers_are_read(tmp_path):
    schema = answer_schema({"score": "string"}, keep_candidates=True)
    candidates = [{"response": "a", "score": 0.9}, {"response": "b", "score": -0.1}, {"response": "c", "score": None}]
    counts = {"n_candidates": 3, "tokens": 3, "cost": 0.0, "abstained": False, "dataset": "d", "id": "0"}
    rows = [{"instruction": "say a", "response": "a", "score": 0.9, "source_score": "x", "candidates": candidates, **counts}]
    publish_table(f"{tmp_path}/answers", rows, "answers", schema, folder="data/answers")
    run_export(f"{tmp_path}/answers", f"{tmp_path}/sft", ExportOptions("sft"))
    assert read(f"{tmp_path}/sft") == [{"prompt": "say a", "completion": "a"}]
    summary = run_export(f"{tmp_path}/answers", f"{tmp_path}/dpo", ExportOptions("dpo"))
    assert read(f"{tmp_path}/dpo") == [{"prompt": "say a", "chosen": "a", "rejected": "b", "margin": 1.0}]
    assert summary["by"] == "score" and summary["left_out"]["without_value"] == 1
