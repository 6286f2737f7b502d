import json
from pathlib import Path

import pytest

from cluster import storage
from cluster.config import DEMO_TASKS, load
from cluster.errors import UsageError
from generation import cost_model, plan
from generation.cost_model import Count
from tests.cappy.test_cli import error_line
from tests.conftest import cappy
from tests.generation.made_set import publish


def rows_file(folder, count=30):
    rows = [{"instruction": f"say number {n}", "references": [f"number {n}"], "dataset": "ab"[n % 2]} for n in range(count)]
    rows += [{"instruction": "yes or no?", "references": ["yes"], "answer_choices": ["yes", "no", "maybe"], "dataset": "choice"}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"instruction": "no references"}]))
    return f"source={{kind: files, path: '{folder}/rows.jsonl', validation_fraction: 0}}"


def test_all_rows_are_counted_and_tokens_are_counted_for_a_sample(tmp_path):
    config = load(None, [rows_file(tmp_path), "plan.sample_rows=3"])
    seen = []

    def ten_tokens_each(texts):
        seen.extend(texts)
        return [10] * len(texts)

    counts, letters, _ = plan.count_source(config, ten_tokens_each, lambda texts: [4] * len(texts))
    assert letters == 1 and counts["choice"] == Count(train=1, references=1, choices=2)
    assert counts["a"].train == counts["a"].sampled_rows == counts["a"].sampled_references == 15
    assert sorted(seen) == [f"say number {n}" for n in range(6)]  # three of each sampled dataset
    whole = sum(len(f"say number {n}") for n in range(0, 30, 2))
    assert counts["a"].prompt_tokens == pytest.approx(30 * whole / 36)  # 30 tokens for the 36 bytes counted


def test_the_references_of_train_rows_limit_the_planned_tokens(tmp_path):
    rows = [
        {"instruction": f"{name} {n}", "references": [text], "dataset": name, "split": split}
        for name, text, split in (("short", "four", "train"), ("long", "x" * 90, "train"), ("unseen", "four", "validation"))
        for n in range(10)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = f"source={{kind: mixture, parts: [{{name: all, source: {{kind: files, path: '{tmp_path}/rows.jsonl'}}}}]}}"
    decodings = "sampler.decodings=[{name: greedy, temperature: 0, max_tokens: 30, min_tokens: 3}, {name: warm, n: 4, max_tokens: 64}]"
    config = load(None, [source, decodings, "sampler.max_tokens_from=references"])
    counts = plan.count_source(config, lambda texts: [20] * len(texts), lambda texts: [40] * len(texts)).counts
    assert counts["all"].limits == {"long": (10, 38), "short": (10, 10)}
    rates = plan.find_rates(config)
    totals = cost_model.estimate_plan(counts, config, rates)["totals"]
    # 40 tokens per candidate, cut to the limits of the datasets and decodings.
    assert totals["sampled_tokens"]["expected"] == 10 * ((30 + 4 * 38) + (10 + 4 * 10) + (30 + 4 * 40))
    assert totals["sampled_tokens"]["most"] == 10 * ((30 + 4 * 38) + (10 + 4 * 10) + (30 + 4 * 64))


def test_settings_take_precedence_over_measurements_and_measurements_over_calculations(tmp_path):
    publish(f"{tmp_path}/set", rates={"tokens_per_second": 80.0, "prompt_tokens": 390})
    (tmp_path / "rates.json").write_text('news\n{"tokens_per_second": 123.0, "tokens_per_candidate": 7.5}\n')
    (tmp_path / "none.json").write_text("{}")
    given = plan.find_rates(load(None, ["plan.sampled_tokens_per_second=9", f"plan.rates_from={tmp_path}/set"]))
    assert (given.sampled, given.prompt, given.tokens_per_candidate) == (9.0, None, 3.0)
    of_set = plan.find_rates(load(None, [f"plan.rates_from={tmp_path}/set", "sampler.model=other/model-3b"]))
    assert of_set.sampled == 80.0 and "with smollm2-135m-instruct, not other/model-3b" in of_set.origin["sampled"]
    assert "the ratio of prompt tokens to sampled tokens of that run: 2" in of_set.origin["prompt"]
    assert of_set.bytes_per_pair == sum(n for name, n in storage.list_files(f"{tmp_path}/set/data").items()) / 91
    benchmark = plan.find_rates(load(None, [f"plan.rates_from={tmp_path}/rates.json"]))
    assert (benchmark.sampled, benchmark.tokens_per_candidate, benchmark.bytes_per_pair) == (123.0, 7.5, cost_model.BYTES_PER_PAIR)
    llama = ["sampler.model=meta-llama/Llama-3.1-8B-Instruct", "plan.gpu=H100"]
    calculated = plan.find_rates(load(None, [*llama, "sampler.engine.tensor_parallel=2"]), context=1000)
    # 64 candidates of 1,000 tokens: 16 GB of weights and 8.4 GB of KV cache per step, at 60 % of twice 3.35 TB/s.
    products = 2 * 8e9 * 64 / (0.5 * 2 * 989e12)
    assert calculated.sampled == pytest.approx(64 / ((16e9 + 64 * 131e6) / (0.6 * 6.7e12) + products + 0.003))
    assert "calculated for 2 H100 from the memory traffic, 64 candidates" in calculated.origin["sampled"]
    assert "from the name of the model" in calculated.origin["sampled"] and not any("H100" in text for text in calculated.warnings)
    for uri, reason in ((f"{tmp_path}/none.json", "has no tokens_per_second"), (f"{tmp_path}/gone.json", "cannot be read as JSON")):
        with pytest.raises(UsageError, match=rf"plan.rates_from={uri} {reason}"):
            plan.find_rates(load(None, [f"plan.rates_from={uri}"]))


def test_the_command_prints_the_plan_with_every_assumption_and_writes_no_files(tmp_path):
    settings = ["--set", rows_file(tmp_path), "--set", f"workspace={tmp_path}/w", "--set", "sampler.model=some/llm-7b"]
    result = json.loads(cappy("plan", *settings, "--json").stdout.splitlines()[-1])
    assert result["totals"]["pairs"] == 31 + 2 + 30 + 30 * 17 and result["dead_letters"] == 1
    assert result["mixture"]["choice"]["candidates"] == 0 and set(result["compute"]["wall_hours"]) == {"1", "8", "64", "512"}
    assert all(each["from"] for each in result["assumptions"])
    shown = cappy("plan", *settings, COLUMNS="200").stdout
    for text in (
        "GPU-hours",
        "time on 512 GPUs",
        "training",
        "sampled tokens",
        "573: reference 31",
        "plan.gpu_dollars_per_hour",
        "bytes / 4",
        "1 rows of the",
    ):
        assert text in shown
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("gpu", "tensor_parallel", "warning"),
    [("L4", 1, "do not fit into 1 L4; set sampler.engine.tensor_parallel=7 or more"), ("H200", 2, None)],
)
def test_weights_that_do_not_fit_are_a_warning(gpu, tensor_parallel, warning):
    sizes = ["sampler.model=some/llm-70b", f"plan.gpu={gpu}", f"sampler.engine.tensor_parallel={tensor_parallel}"]
    warnings = [text for text in plan.find_rates(load(None, sizes)).warnings if "this machine" not in text]
    assert [text.partition("(140 GB) ")[2].partition(", or")[0] for text in warnings] == ([warning] if warning else [])


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu_gets_an_estimate_of_its_cpu(tmp_path):
    config = load(None, [rows_file(tmp_path)])
    result = plan.run_plan(config)
    machine, training = result["compute"]["machine"], result["training"]
    assert machine["name"].endswith("CPU core(s)") and machine["hours"]["expected"] > result["compute"]["gpu_hours"]["expected"]
    assert training["machine_hours"] > training["gpu_hours"] > 0
    assert training["pairs"] == config.training.epochs * result["totals"]["pairs"]  # all rows are train rows
    measured = plan.find_rates(load(None, ["plan.sampled_tokens_per_second=9", "sampler.replicas=2"]))
    assert measured.machine and (measured.machine.sampled, measured.machine.origin) == (18, "plan.sampled_tokens_per_second")


def test_the_plan_of_the_demo_uses_the_tokenizer_of_its_embedded_model():
    result = json.loads(cappy("plan", "demo", "--json").stdout.splitlines()[-1])
    drawn = sum(decoding.n for decoding in load("demo").sampler.decodings)
    assert set(result["mixture"]) == set(DEMO_TASKS) and result["totals"]["candidates"] == drawn * result["totals"]["instructions"]
    assert any("its tokenizer" in each["from"] for each in result["assumptions"])
    assert any("0.135G parameters, counted" in each["from"] for each in result["assumptions"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("plan.prompt_tokens_per_second=9", "prompt_tokens_per_second=9 is given alone; give sampled_tokens_per_second with it"),
        ("plan.rates_from=/none", "/none is not there"),
        ("plan.gpus=[0]", "plan.gpus.0=0"),
        ("source={kind: files, path: /none/x.jsonl}", "source.path=/none/x.jsonl: found no .jsonl"),
    ],
)
def test_an_invalid_setting_is_a_one_line_error(setting, message):
    result = cappy("plan", "--set", setting)
    assert message in error_line(result, result.returncode) and result.returncode in (1, 2)
