import asyncio
import shutil

import pytest
from transformers import AutoTokenizer

from cluster.config import Config, PromptConfig, SamplerConfig
from cluster.errors import UsageError
from generation import engines, plan
from generation.engines.chat_template import check_template
from generation.engines.prompt_encoding import encode_prompt
from generation.sampler import Sampler
from tests.generation.fixed_llm import FixedLLM
from tests.generation.test_sampler import table

# As in the templates of Gemma and of the first Mistral models.
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for turn in messages %}{{ turn['content'] }} {% endfor %}"
)
ONE_TURN = "{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}{{ messages[0]['content'] }}"
NO_SYSTEM_TEXT = "{% for turn in messages if turn['role'] != 'system' %}{{ turn['content'] }} {% endfor %}"
BY_VARIABLE = "{% if not thinking %}{{ raise_exception('set thinking') }}{% endif %}{{ messages[-1]['content'] }}"


@pytest.fixture(scope="module")
def folder(seq2seq, tmp_path_factory):
    """A model whose tokenizer has no template yet; `model` writes one."""
    return shutil.copytree(seq2seq, tmp_path_factory.mktemp("chat") / "model")


def model(folder, template):
    """Write a chat template into the folder of a model, and return its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


REFUSED = [
    (
        NO_SYSTEM,
        {"system": "Be brief."},
        r"sampler\.prompt\.system='Be brief\.': .* \(System role not supported\); set sampler\.prompt\.sys",
    ),
    (ONE_TURN, {"shots": 2}, r"sampler\.prompt\.shots=2: .* refuses the prompt \(one turn only\); set sampler\.prompt\.form=raw"),
    (BY_VARIABLE, {"chat_template_kwargs": {"thinking": False}}, r"sampler\.prompt\.form=chat: .* \(set thinking\)"),
]


@pytest.mark.parametrize(("template", "prompt", "message"), REFUSED)
def test_a_template_that_refuses_the_prompt_is_an_error_before_the_llm_loads(folder, template, prompt, message):
    model(folder, template)
    config = SamplerConfig(model=str(folder), prompt=prompt)
    with pytest.raises(UsageError, match=message) as caught:
        engines.check_sampler_config(config)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("template", "prompt", "message"), REFUSED)
def test_plan_reports_a_template_that_refuses_the_prompt(folder, tmp_path, template, prompt, message):
    model(folder, template)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "say a hen", "references": ["a hen"]}\n')
    config = Config(source={"kind": "files", "path": str(rows)}, sampler=SamplerConfig(model=str(folder), prompt=prompt))
    with pytest.raises(UsageError, match=message):
        plan.run_plan(config)


@pytest.mark.parametrize("prompt", [{}, {"shots": 2}, {"form": "raw", "system": "Be brief."}, {"chat_template_kwargs": {"thinking": True}}])
def test_a_prompt_that_the_template_accepts_is_accepted(folder, prompt):
    tokenizer = model(folder, BY_VARIABLE if "chat_template_kwargs" in prompt else NO_SYSTEM)
    check_template(tokenizer, PromptConfig(**prompt), "m")
    engines.check_sampler_config(SamplerConfig(model=str(folder), prompt=prompt))


def test_a_template_that_ignores_the_system_text_is_reported(folder, capsys):
    check_template(model(folder, NO_SYSTEM_TEXT), PromptConfig(system="Be brief."), "m")
    assert "sampler.prompt.system: the chat template of sampler.model=m ignores it" in capsys.readouterr().err


def test_a_refusal_in_the_sampler_ends_the_run_and_fails_no_row(folder):
    """The model of a hub name is not on the driver, so only the sampler finds out."""
    tokenizer = model(folder, NO_SYSTEM)

    class Chat(FixedLLM):
        def encode(self, turns, form, room):
            return encode_prompt(tokenizer, turns, form, 1000)

    async def collect():
        return [part async for part in Sampler(SamplerConfig(prompt={"system": "Be brief."}), 7, Chat)(table("one"))]

    with pytest.raises(UsageError, match=r"sampler\.prompt\.system='Be brief\.'"):
        asyncio.run(collect())
