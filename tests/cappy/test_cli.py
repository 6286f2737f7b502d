"""The command line: exit codes, error lines, and the content of standard output."""

import json
import os
import re
import socket
import subprocess

import pytest
from typer.testing import CliRunner

from cappy.cli import app
from cluster import artifacts
from tests.conftest import CAPPY, cappy

ROW = json.dumps({"instruction": "say a", "references": ["a"]}) + "\n"


def error_line(result, code):
    """Return the error line, after checks of the exit code, for no traceback and for one line only."""
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return line


def test_help_lists_all_verbs_and_each_has_a_help_page():
    text = re.sub(r"\x1b\[[0-9;]*m", "", cappy("--help", COLUMNS="120").stdout)
    verbs = set(re.findall(r"^│ (\w+) ", text, re.M)) - {"─"}
    made = {"plan", "generate", "extend", "combine", "annotate", "train", "adapt", "evaluate", "compare", "answer", "score", "serve"}
    assert made | {"inspect", "list", "push", "pull", "export", "run", "doctor", "config"} == verbs
    for verb in verbs:
        help_ = CliRunner(env={"COLUMNS": "120"}).invoke(app, [verb, "--help"])
        assert help_.exit_code == 0 and "Usage:" in help_.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["generate", "--set", "sampler.replica=2"], 2, "unknown key sampler.replica; did you mean 'replicas'?"),
        (["generate", "no-such.yaml"], 2, "config file no-such.yaml does not exist; give a path or one of: cappy-large, cappy-"),
        (
            ["generate", "--set", "source={kind: files, path: /none/*.jsonl}"],
            2,
            "source.path=/none/*.jsonl: found no .jsonl, .ndjson, .json, .csv, .parquet (or .gz) file",
        ),
        (["generate", "--set", "workspace=ftp://x/y"], 2, "dataset=ftp://x/y/dataset: unsupported scheme; use a local path or s3://"),
        (["generate", "--set", "sampler.model=/none"], 2, "sampler.model=/none: no such folder"),
        (["train", "--set", "workspace=/none/w"], 1, "/none/w/dataset is not there; run `cappy generate` (again)"),
        (["annotate", "/none/a", "/none/b"], 1, "/none/a is not there; run `cappy generate` (again)"),
        (["annotate", "a", "b", "--set", "generate.label.metric=bleu"], 2, "generate.label.metric='bleu': Input should be 'rouge_l'"),
        (
            ["annotate", "a", "b", "--set", "generate.label={metric: chrf, mode: unicode}"],
            2,
            "generate.label: mode=unicode is for rouge_l and token_f1; metric=chrf compares no words; leave mode out",
        ),
        (["evaluate", "--set", "workspace=/none/w"], 1, "/none/w/dataset is not there; run `cappy generate`"),
        (["serve", "--set", "scorer_path=/none/w/scorer"], 2, "scorer_path=/none/w/scorer: no such folder"),
        (["push", "/none/w", "/none/v"], 1, "SRC=/none/w has no readable _MANIFEST.json"),
        (["export", "/none/w", "/none/v", "--as", "dpo"], 1, "SRC=/none/w has no readable _MANIFEST.json"),
        (["export", "/none/w", "/none/v", "--as", "csv"], 2, "--as=csv: no such format; choose one of sft, dpo, reward, kto, chat, pairs"),
        (["score", "/none/w.jsonl", "/none/v"], 2, "SRC=/none/w.jsonl: found no .jsonl, .ndjson, .json, .csv, .parquet (or .gz) file"),
        (["score", "a", "b", "--set", "score.keep_above=high"], 2, "score.keep_above='high': Input should be a valid number"),
        (["pull", "ftp://x/y"], 2, "SRC=ftp://x/y: unsupported scheme; use a local path or s3://"),
        (["inspect", "/none/w"], 1, "URI=/none/w has no readable _MANIFEST.json"),
        (["generate", "--address", "127.0.0.1:1"], 2, "--address=127.0.0.1:1: give the cluster's dashboard, e.g. http://127.0.0.1:8265"),
        (["generate", "--address", "http://127.0.0.1:9"], 1, "--address=http://127.0.0.1:9: no Ray cluster answers there"),
    ],
)
def test_invalid_input_is_one_line_with_the_setting_its_value_and_the_fix(arguments, code, message, tmp_path):
    if not any("workspace" in each for each in arguments) and arguments[0] == "generate":
        arguments = [*arguments, "--set", f"workspace={tmp_path}"]
    assert message in error_line(cappy(*arguments), code)


def test_debug_shows_the_traceback():
    result = cappy("inspect", "/none", "--debug")
    assert result.returncode == 1 and "Traceback" in result.stderr


def test_json_puts_an_error_on_the_last_line_of_stdout_too():
    result = cappy("train", "--set", "workspace=/none/w", "--json")
    assert json.loads(result.stdout.splitlines()[-1])["exit_code"] == 1


def test_standard_output_is_utf_8_when_an_argument_is_not():
    command = [*CAPPY, "inspect", b"/none/\xff", "--json"]
    result = subprocess.run(command, capture_output=True, env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"})
    message = json.loads(result.stdout.decode("utf-8").splitlines()[-1])["error"]
    assert result.returncode == 1 and message.startswith("URI=/none/\udcff has no readable")
    assert "/none/\\udcff" in result.stderr.decode("utf-8")


def test_a_port_in_use_is_an_error_before_a_model_is_loaded(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = error_line(cappy("serve", "--set", f"serving.port={port}", "--set", f"workspace={tmp_path}"), 1)
    assert f"serving.port={port}" in line and "in use" in line


def test_an_error_names_the_unreachable_bucket_and_prints_no_secret(s3_server):
    result = cappy("generate", "--set", "workspace=s3://not-a-bucket/run", **s3_server)
    assert "dataset=s3://not-a-bucket/run/dataset: bucket 'not-a-bucket' does not exist" in error_line(result, 1)
    assert s3_server["AWS_SECRET_ACCESS_KEY"] not in result.stdout + result.stderr


def test_a_finished_destination_is_not_touched(tmp_path):
    (tmp_path / "rows.jsonl").write_text(ROW)
    artifacts.publish(str(tmp_path / "dataset"), {"kind": "dataset", "files": {}})
    result = cappy("generate", "--set", f"workspace={tmp_path}", "--set", f"source={{kind: files, path: {tmp_path}/rows.jsonl}}")
    assert f"dataset={tmp_path}/dataset already holds a finished run; choose another dataset" in error_line(result, 2)


def test_doctor_passes_on_this_machine_and_fails_for_an_unusable_store(tmp_path):
    good = cappy("doctor", "--json", "--set", f"workspace={tmp_path}/not/yet")
    report = json.loads(good.stdout.splitlines()[-1])
    assert good.returncode == 0 and report["ok"], report
    assert {"engine", "storage", "import vllm", "model minilm-l6"} <= {check["check"] for check in report["checks"]}
    bad = cappy("doctor", "--no-models", "--set", "workspace=/proc/no/such", COLUMNS="150")
    assert bad.returncode == 1 and "FAIL" in bad.stdout and "->" in bad.stdout
    assert list(tmp_path.iterdir()) == []  # an empty workspace is removed as well
