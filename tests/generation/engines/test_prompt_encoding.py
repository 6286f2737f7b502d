import pytest
from transformers import AutoTokenizer

from cluster.errors import CappyError
from generation.engines.prompt_encoding import encode_prompt
from generation.prompts import messages
from tests.generation.engines.conftest import write_tokenizer

SHOTS = [{"instruction": "say a red fox", "response": "a red fox"}, {"instruction": "say the owl", "response": "the owl"}]
TURNS = messages("say a blue hen", SHOTS)


@pytest.fixture
def tokenizer(tmp_path):
    write_tokenizer(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


def words(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True)


def test_shots_are_dropped_from_the_front_until_the_prompt_fits(tokenizer):
    whole = encode_prompt(tokenizer, TURNS, "raw", 1000)
    assert words(tokenizer, whole) == "say a red fox a red fox say the owl the owl say a blue hen"
    assert encode_prompt(tokenizer, TURNS, "raw", len(whole)) == whole
    one_shot = encode_prompt(tokenizer, TURNS, "raw", len(whole) - 1)
    assert words(tokenizer, one_shot) == "say the owl the owl say a blue hen"
    assert words(tokenizer, encode_prompt(tokenizer, TURNS, "raw", len(one_shot) - 1)) == "say a blue hen"


def test_a_prompt_that_is_too_long_without_shots_is_returned_whole(tokenizer):
    assert words(tokenizer, encode_prompt(tokenizer, TURNS, "raw", 1)) == "say a blue hen"


def test_no_shot_is_dropped_if_the_caller_forbids_it(tokenizer):
    assert encode_prompt(tokenizer, TURNS, "raw", 1, drop_shots=False) == encode_prompt(tokenizer, TURNS, "raw", 1000)


def test_the_chat_form_applies_the_template_once_and_adds_no_special_tokens(tokenizer):
    tokenizer.chat_template = "{% for turn in messages %}<s>{{ turn['content'] }}{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
    ids = encode_prompt(tokenizer, messages("say a hen"), "chat", 1000)
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "say", "a", "hen", "<s>"]


def test_variables_reach_the_chat_template(tokenizer):
    tokenizer.chat_template = "{% if thinking %}red{% else %}blue{% endif %} {{ messages[0]['content'] }}"
    for thinking, word in ((True, "red"), (False, "blue")):
        ids = encode_prompt(tokenizer, messages("hen"), "chat", 1000, template_kwargs={"thinking": thinking})
        assert words(tokenizer, ids) == f"{word} hen"


def test_the_chat_form_of_a_model_without_a_template_is_an_error(tokenizer):
    with pytest.raises(CappyError, match=r"sampler\.prompt\.form=chat: the model has no chat template; set sampler\.prompt\.form=raw"):
        encode_prompt(tokenizer, TURNS, "chat", 1000)
