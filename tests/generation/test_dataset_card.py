import re
import xml.etree.ElementTree as ElementTree

import datasets
import yaml

from cluster import artifacts
from cluster.config import Config, load
from generation import dataset_card
from tests.generation.made_set import publish


def header(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_the_card_has_the_counts_and_the_settings_of_the_manifest(tmp_path):
    config = load(None, ["sampler.prompt={form: raw, shots: 3}", "seed=7", "sampler.decodings=[{name: warm, n: 4, stop: ['|']}]"])
    manifest = publish(str(tmp_path), config=config)
    text = (tmp_path / "README.md").read_text()
    assert text == dataset_card.render_card({key: value for key, value in manifest.items() if key != "writer"})
    for line in (
        "13 instructions, 91 pairs, 195 sampled tokens",
        "| train | 10 | 70 |",
        "| mismatched | 13 |",
        "| task 0 | 7 |",
        "| warm | 4 | temperature 1, max_tokens 64, stop '\\|' |",
        "- LLM: `smollm2-135m-instruct`",
        "- prompt: raw form, 3 shots",
        "- labels: Rouge-L (paper mode, version 1)",
        "- by `cappy generate config.yaml`, code 0.1.0",
        "- seed: 7",
        "![labels by source](labels.svg)",
        f'datasets.load_dataset("parquet", data_files={{"train": "{tmp_path}/data/train/part-*.parquet"}})',
    ):
        assert line in text
    assert header(text)["size_categories"] == ["n<1K"] and header(text)["license"] == "unknown"
    assert {"README.md", "labels.svg"} <= manifest["files"].keys() and artifacts.verify(str(tmp_path), manifest) == []


def test_hugging_face_reads_the_splits_from_the_header(tmp_path):
    publish(str(tmp_path / "set"))
    opened = datasets.load_dataset(str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))
    assert {name: split.num_rows for name, split in opened.items()} == {"train": 10, "validation": 3}


def test_the_card_has_the_canary_note_for_big_bench_also_within_a_mixture():
    bigbench = Config().model_dump(mode="json")["source"]
    files = {"kind": "files", "path": "rows.jsonl", "train_rows": None}
    assert "canary" in dataset_card.canary_section(bigbench) and "canary" in dataset_card.canary_section(
        {"kind": "mixture", "parts": [{"source": bigbench}, files]}
    )
    assert dataset_card.canary_section(files) == ""
    assert dataset_card._describe_sources({"kind": "mixture", "parts": [files, {"kind": "bigbench", "tasks": ["a", "b"]}]}) == (
        "files (path rows.jsonl); bigbench (tasks a, b)"
    )


def test_the_card_has_the_licence_and_warns_about_an_unknown_licence(tmp_path):
    publish(str(tmp_path / "a"), config=load(None, ["generate.license=apache-2.0"]))
    publish(str(tmp_path / "b"))
    known, unknown = ((tmp_path / name / "README.md").read_text() for name in "ab")
    assert header(known)["license"] == "apache-2.0" and "Unknown" not in known
    assert "Unknown: the instructions and references keep the licences" in unknown


def test_the_card_contains_no_environment_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t-that-must-not-show")
    publish(str(tmp_path))
    assert not any(b"s3cr3t" in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


def test_the_plot_depends_on_the_counts_and_shows_each_source_of_the_set():
    labels = {"sampled": [5, 0, 1, 0, 0, 2, 0, 0, 0, 3], "reference": [0] * 9 + [1234], "mismatched": [77] + [0] * 9}
    plot = dataset_card.plot_labels(labels)
    assert ElementTree.fromstring(plot).tag.endswith("svg") and dataset_card.plot_labels(labels) == plot
    comments = re.findall(r"<!-- (.+?) -->", plot.decode())  # matplotlib draws text as paths and repeats it in a comment
    assert {"reference (1)", "1,234", "mismatched (0)", "77", "sampled"} <= set(comments) and "choice (0)" not in comments
    assert (
        dataset_card.plot_labels(labels, "png").startswith(b"\x89PNG") and dataset_card.plot_labels(labels | {"sampled": [1] * 10}) != plot
    )
