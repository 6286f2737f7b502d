import json

import pytest

from cappy import display
from cluster import storage
from cluster.config import DEMO_TASKS, load
from cluster.errors import UsageError
from generation import cost_model, plan
from generation.cost_model import Count, Rates
from tests.cappy.test_cli import error_line
from tests.conftest import cappy
from tests.generation.made_set import publish

ORIGIN = {"sampled": "measured", "prompt": "measured", "tokens_per_candidate": "measured", "bytes_per_pair": "measured"}
DECODINGS = "sampler.decodings=[{name: greedy, temperature: 0, max_tokens: 10}, {name: warm, n: 4, max_tokens: 30}]"
# 100 sampled instructions with 150 references of 8 tokens, 20 tokens each; 50 classification rows with 2 wrong choices each.
COUNTS = {
    "made up": Count(80, 20, 100, 150, 150, 0, 2000.0, 1200.0),
    "multiple choice": Count(40, 10, 0, 50, 0, 100),
}


def planned(*overrides, **changed):
    rates = {"sampled": 50.0, "prompt": 200.0, "tokens_per_candidate": None, "bytes_per_pair": 100.0, "origin": ORIGIN}
    return cost_model.estimate_plan(COUNTS, load(None, [DECODINGS, *overrides]), Rates(**rates | changed))


def test_rows_pairs_and_tokens_are_those_worked_by_hand():
    result = planned("generate.mismatched=2")
    totals = result["totals"]
    assert totals["instructions"] == 150 and totals["sampled_instructions"] == 100
    # 5 candidates an instruction; 2 mismatched a reference of a sampled row.
    assert totals["pairs_by_source"] == {"reference": 200, "choice": 100, "mismatched": 300, "sampled": 500}
    assert totals["pairs"] == 1100 and totals["bytes"] == 110_000
    # 8 tokens a candidate, as its reference; at most 10 + 4 x 30.
    assert totals["sampled_tokens"] == {"expected": 100 * 5 * 8, "most": 100 * 130} and totals["prompt_tokens"] == 2000
    row = result["mixture"]["made up"]
    assert (row["train"], row["validation"], row["mean_prompt_tokens"], row["candidates"], row["pairs"]) == (80, 20, 20.0, 500, 950)


def test_hours_and_dollars_are_those_worked_by_hand():
    result = planned("plan.gpus=[1, 2, 8]", "sampler.engine.tensor_parallel=2", "plan.gpu_dollars_per_hour=3")
    expected = (2000 / 200 + 4000 / 50) / 3600  # of a replica of two GPUs: 90 s
    assert result["compute"]["gpu_hours"]["expected"] == pytest.approx(2 * expected)
    assert result["compute"]["wall_hours"] == {"1": None, "2": pytest.approx(expected), "8": pytest.approx(expected / 4)}
    assert result["dollars"]["expected"] == pytest.approx(6 * expected)
    assert result["dollars"]["most"] == pytest.approx(6 * (10 + 13_000 / 50) / 3600)


def test_a_rate_that_has_the_reading_in_it_counts_sampled_tokens_alone():
    assert planned(prompt=None)["compute"]["gpu_hours"]["expected"] == pytest.approx(4000 / 50 / 3600)


@pytest.mark.parametrize(("tokens", "expected"), [(20.0, 100 * (10 + 4 * 20)), (100.0, 100 * 130)])
def test_measured_tokens_of_a_candidate_replace_the_references_length_up_to_the_most(tokens, expected):
    assert planned(tokens_per_candidate=tokens)["totals"]["sampled_tokens"]["expected"] == expected


def test_shots_are_read_once_on_gpus_and_counted_in_the_prompt_up_to_the_context():
    plain, shots = planned(), planned("sampler.prompt.shots=3")
    assert shots["mixture"]["made up"]["mean_prompt_tokens"] == 20 + 3 * (20 + 8)
    assert shots["compute"] == plain["compute"]
    assert planned("sampler.prompt.shots=3", "sampler.engine.max_model_len=64")["mixture"]["made up"]["mean_prompt_tokens"] == 64


def test_an_endpoint_costs_its_prices_and_no_gpu():
    class Priced:
        kind = "endpoint"
        price_per_million_prompt = 0.5
        price_per_million_sampled = 2.0

    config = load(None, [DECODINGS])
    config = config.model_copy(update={"sampler": config.sampler.model_copy(update={"engine": Priced()})})
    result = cost_model.estimate_plan(COUNTS, config, Rates(1.0, None, None, 100.0, ORIGIN))
    assert result["compute"] is None
    assert result["dollars"]["expected"] == pytest.approx((2 * 2000 * 0.5 + 4000 * 2) / 1e6)  # two decodings, two requests


def test_times_and_sizes_read_as_people_say_them():
    assert [display.duration(hours) for hours in (0.5 / 3600, 12 / 3600, 0.5, 7.25, 100)] == [
        "0.5 s",
        "12 s",
        "30.0 min",
        "7.2 h",
        "4.2 days",
    ]
    assert [display.size(count) for count in (283_000, 1.4e6, 21e9, 2.5e12)] == ["283.0 kB", "1.4 MB", "21.0 GB", "2.5 TB"]


def rows_file(folder, count=30):
    rows = [{"instruction": f"say number {n}", "references": [f"number {n}"], "dataset": "ab"[n % 2]} for n in range(count)]
    rows += [{"instruction": "yes or no?", "references": ["yes"], "answer_choices": ["yes", "no", "maybe"], "dataset": "choice"}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"instruction": "no references"}]))
    return f"source={{kind: files, path: '{folder}/rows.jsonl', validation_fraction: 0}}"


def test_a_source_is_counted_row_by_row_and_its_tokens_from_a_part_of_it(tmp_path):
    config = load(None, [rows_file(tmp_path), "plan.sample_rows=3"])
    seen = []

    def ten_a_row(texts):
        seen.extend(texts)
        return [10] * len(texts)

    counts, letters = plan.count_source(config, ten_a_row, lambda texts: [4] * len(texts))
    assert letters == 1 and counts["choice"] == Count(train=1, references=1, choices=2)
    assert counts["a"].train == counts["a"].sampled_rows == counts["a"].sampled_references == 15
    assert sorted(seen) == [f"say number {n}" for n in range(6)]  # three of each sampled dataset
    whole = sum(len(f"say number {n}") for n in range(0, 30, 2))
    assert counts["a"].prompt_tokens == pytest.approx(30 * whole / 36)  # 30 tokens for the 36 bytes counted


def test_rates_come_from_the_settings_then_a_measurement_then_a_calculation(tmp_path):
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
    calculated = plan.find_rates(load(None, ["sampler.model=meta-llama/Llama-3.1-8B-Instruct", "sampler.engine.tensor_parallel=2"]))
    assert calculated.sampled == calculated.prompt == pytest.approx(0.5 * 990e12 * 2 / 16e9)
    assert (
        "a calculation, not a measurement" in calculated.origin["sampled"] and "from the name of the model" in calculated.origin["sampled"]
    )
    for uri, reason in ((f"{tmp_path}/none.json", "has no tokens_per_second"), (f"{tmp_path}/gone.json", "cannot be read as JSON")):
        with pytest.raises(UsageError, match=rf"plan.rates_from={uri} {reason}"):
            plan.find_rates(load(None, [f"plan.rates_from={uri}"]))


def test_the_verb_prints_the_mixture_the_totals_and_every_assumption_and_writes_nothing(tmp_path):
    settings = ["--set", rows_file(tmp_path), "--set", f"workspace={tmp_path}/w", "--set", "sampler.model=some/llm-70b"]
    result = json.loads(cappy("plan", *settings, "--json").stdout.splitlines()[-1])
    assert result["totals"]["pairs"] == 31 + 2 + 30 + 30 * 17 and result["dead_letters"] == 1
    assert result["mixture"]["choice"]["candidates"] == 0 and set(result["compute"]["wall_hours"]) == {"1", "8", "64", "512"}
    assert all(each["from"] for each in result["assumptions"])
    shown = cappy("plan", *settings, COLUMNS="200").stdout
    for text in (
        "GPU-hours",
        "time on 512 GPUs",
        "sampled tokens",
        "573: reference 31",
        "plan.gpu_dollars_per_hour",
        "bytes / 4",
        "1 rows of the",
    ):
        assert text in shown
    assert not (tmp_path / "w").exists()


def test_the_demo_is_planned_with_the_tokenizer_of_its_embedded_model():
    result = json.loads(cappy("plan", "demo", "--json").stdout.splitlines()[-1])
    drawn = sum(decoding.n for decoding in load("demo").sampler.decodings)
    assert set(result["mixture"]) == set(DEMO_TASKS) and result["totals"]["candidates"] == drawn * result["totals"]["instructions"]
    assert any("its tokenizer" in each["from"] for each in result["assumptions"])
    assert any("0.135G parameters, counted" in each["from"] for each in result["assumptions"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("plan.prompt_tokens_per_second=9", "prompt_tokens_per_second=9 stands alone; give sampled_tokens_per_second with it"),
        ("plan.rates_from=/none", "/none is not there"),
        ("plan.gpus=[0]", "plan.gpus.0=0"),
        ("source={kind: files, path: /none/x.jsonl}", "source.path=/none/x.jsonl: no .jsonl"),
    ],
)
def test_what_cannot_be_planned_is_one_line(setting, message):
    result = cappy("plan", "--set", setting)
    assert message in error_line(result, result.returncode) and result.returncode in (1, 2)
