"""The settings of the candidates of a set, compared with those of a run that extends it."""

from __future__ import annotations

import pytest

from cluster.config import load
from cluster.errors import UsageError
from generation import sampling_records

TWO = "sampler.decodings=[{name: greedy, temperature: 0}, {name: warm, n: 3}]"


def config(*overrides):
    return load(None, [TWO, *overrides])


EARLIER = [sampling_records.of_config(config())]


@pytest.mark.parametrize(
    ("override", "change"),
    [
        ("sampler.decodings=[{name: warm, n: 3, temperature: 0.5}]", r"'warm' and other settings \(temperature: 1.0 -> 0.5\)"),
        ("sampler.decodings=[{name: warm, n: 3, max_tokens: 9}]", r"max_tokens: 64 -> 9"),
        ("sampler.prompt.shots=2", r"'greedy' and other settings \(prompt.shots: 0 -> 2\)"),
        ("sampler.engine.dtype=float32", r"engine.dtype: \"auto\" -> \"float32\""),
        ("sampler.reasoning=keep", r"reasoning: null -> \"keep\""),
        ("seed=3", r"seed: 20261121 -> 3"),
    ],
)
def test_the_same_name_with_other_settings_is_an_error(override, change):
    with pytest.raises(UsageError, match=f"sampler.decodings: SET has candidates of .*{change}.*another name") as caught:
        sampling_records.refuse_other_settings(EARLIER, config(override), "SET")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "sampler.decodings=[{name: hot, temperature: 1.5}]",
        "sampler.decodings=[{name: warm, n: 9}]",
        "sampler.model=other/llm",
        "sampler.engine.max_model_len=512",
        "sampler.replicas=2",
    ],
)
def test_another_name_another_llm_and_more_candidates_are_accepted(override):
    sampling_records.refuse_other_settings(EARLIER, config(override, "sampler.prompt.shots=0"), "SET")


def test_another_llm_can_have_other_settings():
    sampling_records.refuse_other_settings(EARLIER, config("sampler.model=other/llm", "sampler.prompt.shots=2"), "SET")


def test_a_beam_search_cannot_get_more_candidates():
    def beams(n):
        return load(None, ["sampler.engine={kind: transformers}", f"sampler.decodings=[{{name: b, n: {n}, temperature: 0, beams: 4}}]"])

    records = [sampling_records.of_config(beams(2))]
    sampling_records.refuse_other_settings(records, beams(1), "SET")
    with pytest.raises(UsageError, match="n: 2 -> 3 with beams=4"):
        sampling_records.refuse_other_settings(records, beams(3), "SET")


def test_the_records_of_an_extended_set_have_each_decoding_once_with_its_largest_number():
    changed = config("sampler.decodings=[{name: hot, n: 2, temperature: 1.5}, {name: warm, n: 1}]")
    once = sampling_records.merge_records(EARLIER, changed)
    assert [[(each["name"], each["n"]) for each in record["decodings"]] for record in once] == [[("hot", 2), ("warm", 3)], [("greedy", 1)]]
    twice = sampling_records.merge_records(once, config("sampler.model=other/llm"))
    assert [(record["model"], len(record["decodings"])) for record in twice] == [
        ("other/llm", 2),
        ("smollm2-135m-instruct", 2),
        ("smollm2-135m-instruct", 1),
    ]
    assert sampling_records.drawn_candidates(twice, "smollm2-135m-instruct") == {"hot": 2, "warm": 3, "greedy": 1}
    assert sampling_records.drawn_candidates(twice, "other/llm") == {"greedy": 1, "warm": 3}
