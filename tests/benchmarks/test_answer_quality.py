"""The benchmark of answers with hidden references: the lines of the source, and the comparison of the picks."""

from __future__ import annotations

import pytest

from benchmarks import answer_quality
from cluster.config import load
from generation.sources.row import Instruction


def test_only_the_examples_of_a_task_keep_their_references():
    rows = [Instruction(task, None, "", f"{task} {number}", (f"answer {number}",)) for task in ("a", "b") for number in range(6)]
    lines, hidden = answer_quality.hide_references(rows, 2)
    assert [line["key"] for line in lines if "references" in line] == ["a-0", "a-1", "a-2", "b-0", "b-1", "b-2"]
    assert hidden == {"a-3": ["answer 3"], "a-4": ["answer 4"], "b-3": ["answer 3"], "b-4": ["answer 4"]}
    assert "answer 3" not in str([line for line in lines if line["key"] == "a-3"])


def test_the_selection_is_compared_with_the_baselines_on_the_same_candidates():
    config = load(None, {"sampler.decodings": [{"name": "greedy", "temperature": 0.0}, {"name": "warm", "temperature": 1.0, "n": 2}]})

    def candidate(response: str, decoding: str, logprob: float) -> dict:
        return {"response": response, "decoding": decoding, "tokens": 2, "logprob": logprob, "score": 0.0}

    pool = [candidate("a dog", "greedy", -1.0), candidate("a red fox", "warm", -2.0), candidate("a dog", "warm", -1.0)]
    rows = [
        {"key": f"t-{number}", "dataset": "t", "instruction": "name it", "response": "a red fox", "candidates": pool} for number in (3, 4)
    ]
    example = {"key": "t-0", "dataset": "t", "instruction": "name it", "response": "a dog", "candidates": pool}
    result = answer_quality.compare([example, *rows], {"t-3": ["a red fox"], "t-4": ["a red fox"]}, config)
    assert result["rows"] == 2 and result["points"]["selected"] == result["points"]["oracle"] == 100
    assert result["points"]["greedy"] == result["points"]["consensus"] == pytest.approx(40)
    assert result["gains"]["greedy"] == {"mean": 60.0, "low": 60.0, "high": 60.0}
