"""generate, train and evaluate with real small models, through the command line, against a real S3 server.

`tests/serving/test_app.py` tests `cappy serve`.
"""

import json
import os
import re
import signal
import subprocess
import time

import numpy as np
import pytest

from cluster import storage
from generation.dataset import RegressionSet
from generation.labels import rouge_l
from tests.conftest import CAPPY, cappy

pytestmark = pytest.mark.slow

SETTINGS = """
source: {kind: bigbench, tasks: [tense, linguistic_mappings], train_rows: 16, validation_rows: 16}
sampler:
  prompt: {form: raw, shots: 2}
  engine: {max_model_len: 1024}
  decodings:
    - {name: greedy, temperature: 0, max_tokens: 24, stop: ["\\n"]}
    - {name: warm, n: 3, temperature: 0.9, top_k: 40, top_p: 0.95, max_tokens: 24, stop: ["\\n"]}
generate: {unit_rows: 8}
training: {epochs: 1, batch_size: 16}
evaluation: {resamples: 200, examples: 4}
"""


def parse_result(completed):
    """Return the `--json` output of a successful command."""
    assert completed.returncode == 0, completed.stderr
    assert "Traceback" not in completed.stderr
    return json.loads(completed.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def run(s3_server, tmp_path_factory):
    """Run generate (killed once midway), train and evaluate into a bucket; yield the workspace and the JSON output of each verb.

    `killed` holds the completed `train` on the killed run and the log of the second `generate`.
    """
    import boto3

    workspace = "s3://end-to-end/run"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.items():
            patch.setenv(name, value)
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="end-to-end")
        config = tmp_path_factory.mktemp("end-to-end") / "config.yaml"
        config.write_text(f"workspace: {workspace}\n{SETTINGS}")
        kill_midway([*CAPPY, "generate", str(config)], f"{workspace}/dataset/_staging/units")
        refused = cappy("train", str(config))
        done = {verb: cappy(verb, str(config), "--json") for verb in ("generate", "train", "evaluate")}
        results = {verb: parse_result(each) for verb, each in done.items()} | {"killed": (refused, done["generate"].stderr)}
        yield workspace, results


def kill_midway(command, units):
    """Run a command; kill it and its child processes once it has saved a unit."""
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    while not storage.list_files(units):
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_generate_killed_midway_publishes_nothing_and_the_same_command_completes_it(run):
    refused, again = run[1]["killed"]
    assert refused.returncode == 1 and "has no _MANIFEST.json: the run writing it did not finish" in refused.stderr
    resumed = re.search(r"(\d+) of 8 units are finished already; resuming", again)
    assert resumed and 1 <= int(resumed[1]) < 8
    print(refused.stderr, again)


def test_the_set_is_complete_and_its_labels_are_rouge_l(run):
    workspace, results = run
    summary = results["generate"]
    assert summary["instructions"] == 64 and summary["dead_letters"] == 0
    assert summary["sources"]["sampled"] == 64 * 4 and summary["decodings"] == {"greedy": 64, "warm": 192}
    opened = RegressionSet(f"{workspace}/dataset")
    for split in ("train", "validation"):
        for row in next(opened.batches(split)).to_pylist():
            for each in row["candidates"]:
                if each["source"] == "sampled":
                    assert each["label"] == rouge_l(each["response"], row["references"])
                    assert each["logprob"] < 0 and 0 < each["tokens"] <= 24 and each["finish_reason"] in ("stop", "length")
                    assert each["model"] == "smollm2-135m-instruct" and "\n" not in each["response"]


def test_inspect_shows_counts_histogram_and_sources_of_an_s3_set(run):
    workspace, results = run
    shown = cappy("inspect", f"{workspace}/dataset", COLUMNS="160").stdout
    print(shown)
    for text in ("checksums match", "instructions 64 (train 32, validation 32)", "reference", "mismatched", "sampled", "[0.9, 1.0]"):
        assert text in shown
    machine = parse_result(cappy("inspect", f"{workspace}/dataset", "--json"))
    assert machine["summary"] == results["generate"] and machine["problems"] == []


def test_inspect_finds_a_damaged_shard(run):
    workspace, _ = run
    name = next(name for name in storage.list_files(f"{workspace}/dataset") if name.startswith("data/train"))
    intact = storage.read_bytes(f"{workspace}/dataset/{name}")
    storage.write_bytes(f"{workspace}/dataset/{name}", intact[:-9] + bytes([intact[-9] ^ 1]) + intact[-8:])
    damaged = cappy("inspect", f"{workspace}/dataset")
    storage.write_bytes(f"{workspace}/dataset/{name}", intact)
    assert damaged.returncode == 1 and f"{name} does not match its SHA-256" in damaged.stderr


def test_the_set_opens_as_ray_hugging_face_and_pandas(run, ray_here):
    workspace, _ = run
    opened = RegressionSet(f"{workspace}/dataset")
    pandas, hugging_face = opened.to_pandas("train"), opened.to_huggingface("train")
    assert list(pandas["id"]) == hugging_face["id"] and len(pandas) == 32
    assert sorted(row["id"] for row in opened.to_ray("train").take_all()) == sorted(pandas["id"])


def test_plain_transformers_gives_the_exported_scorer_the_same_scores(run, tmp_path):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from training.scorer import Scorer

    workspace, _ = run
    pairs = next(RegressionSet(f"{workspace}/dataset").pairs("validation"))
    ours = Scorer.load(f"{workspace}/scorer").score(pairs.instructions, pairs.responses)
    storage.download_folder(f"{workspace}/scorer", tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    theirs = []
    with torch.inference_mode():
        for instruction, response in zip(pairs.instructions, pairs.responses, strict=True):
            theirs.append(float(model(**tokenizer([instruction], [response], truncation="only_first", return_tensors="pt")).logits[0, 0]))
    assert len(theirs) > 100 and np.std(theirs) > 1e-3
    difference = np.abs(ours - np.asarray(theirs)).max()
    print(f"{len(theirs)} pairs, largest difference {difference:.2e}")
    assert difference < 1e-4


def test_the_evaluation_compares_all_methods_on_every_validation_row(run):
    workspace, results = run
    summary = results["evaluate"]
    assert summary["instructions"] == 32 and summary["tasks"] == 2
    averages = {method: figures["mean"] for method, figures in summary["averages"].items()}
    assert set(averages) == {"greedy", "sample", "self_sum", "self_mean", "consensus", "scorer", "blend", "oracle"}
    assert averages["oracle"] >= max(averages.values()) and averages["oracle"] > averages["sample"]
    assert set(storage.list_files(f"{workspace}/evaluation")) >= {"report.html", "results.json", "rows.parquet", "config.yaml"}
