from types import SimpleNamespace

import numpy as np
import pytest

from training.selection import Selection, Variant
from training.vllm_outputs import rank_outputs


def score(instructions, responses):
    """Score a pair by the length of its response."""
    return np.array([len(each) / 10 for each in responses], np.float32)


def output(prompt, *completions):
    return SimpleNamespace(
        prompt=prompt,
        outputs=[SimpleNamespace(text=text, token_ids=[1] * 2, cumulative_logprob=logprob) for text, logprob in completions],
    )


def test_the_highest_score_wins_without_outer_white_space_and_an_empty_text_never_wins():
    first, second = rank_outputs([output("a", (" xx ", None), ("xxx", None)), output("b", ("", None), ("y", None))], None, score, None)
    assert first[0] == ["xx", "xxx"] and first[1].tolist() == pytest.approx([0.2, 0.3]) and int(first[2].argmax()) == 1
    assert int(second[2].argmax()) == 1 and second[1][0] == 0


def test_a_fitted_selection_ranks_with_the_log_probabilities():
    selection = Selection((Variant(("score", "logprob_mean"), (1.0, 1.0), (1.0, 1.0), pool_variance=0.0),))
    ((_, _, values),) = rank_outputs([output("a", ("xx", -1.0), ("xxx", -9.0))], None, score, selection)
    assert int(values.argmax()) == 0


def test_outputs_without_prompt_or_completion_are_refused():
    with pytest.raises(ValueError, match=r"output 1 has no prompt text, .* give instructions"):
        rank_outputs([output("a", ("x", None)), output(None, ("x", None))], None, score, None)
    assert rank_outputs([output(None, ("x", None))], ["a"], score, None)[0][0] == ["x"]
    with pytest.raises(ValueError, match="output 0 has no completion"):
        rank_outputs([output("a")], None, score, None)
    with pytest.raises(ValueError, match="2 instructions for 1 vLLM outputs"):
        rank_outputs([output("a", ("x", None))], ["a", "b"], score, None)


@pytest.mark.slow
def test_the_attributes_exist_in_the_outputs_of_vllm():
    outputs = pytest.importorskip("vllm.outputs")
    completion = outputs.CompletionOutput(index=0, text="xx", token_ids=[1, 2], cumulative_logprob=-1.0, logprobs=None)
    request = outputs.RequestOutput("1", "say it", [1], None, [completion], True)
    ((texts, scores, _),) = rank_outputs([request], None, score, None)
    assert texts == ["xx"] and scores[0] == pytest.approx(0.2)
