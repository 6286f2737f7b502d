import pytest

from cappy.notebook import answer_prompts
from cappy.verbs import answer
from cluster.errors import UsageError
from tests.generation.fixed_llm import FixedLLM
from tests.serving.number_scorer import load_number_scorer

SETTINGS = {"sampler.decodings": [{"name": "greedy", "temperature": 0}, {"name": "sample", "n": 3}], "answer.keep_candidates": True}
ENGINES = {"load": FixedLLM, "load_scorer": load_number_scorer}


@pytest.mark.usefixtures("ray_here")
def test_each_prompt_has_a_row_in_order_with_its_answer_or_the_reason_for_none():
    chat = [{"role": "system", "content": "be short"}, {"role": "user", "content": "why?"}]
    prompts = ["say it", chat, "TOO LONG", "say it", " ", {"prompt": "pick", "answer_choices": ["yes", "no"], "key": 7}]
    found = answer_prompts(prompts, settings=SETTINGS, **ENGINES)
    assert found["instruction"][[0, 1, 3, 5]].tolist() == ["say it", "be short\n\nwhy?", "say it", "pick"]
    assert found["response"].notna().tolist() == [True, True, False, True, False, True]
    assert found["response"][5] in ("yes", "no") and found["key"][5] == 7
    assert found["n_candidates"][0] == 4 and len(found["candidates"][0]) == 4
    assert "9000 tokens" in found["error"][2] and found["error"][4] == "`instruction` is empty"
    assert found["error"][[0, 1, 3, 5]].isna().all()


def test_bad_prompts_are_one_line_errors():
    with pytest.raises(UsageError, match=r"prompts=\[\]: there is nothing to answer"):
        answer([])
    with pytest.raises(UsageError, match=r"prompts\[1\] is a int; give a text, a chat"):
        answer(["a", 3])
    with pytest.raises(UsageError, match="overwrite and address are for a config"):
        answer(["a"], overwrite=True)
