"""Check the chat template of a model against the prompt of a config, before the model loads. Imports no Ray and no engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from cluster import models
from cluster.config import PromptConfig, SamplerConfig
from cluster.errors import UsageError, first_line
from cluster.progress import log
from generation import prompts


def check_local_template(config: SamplerConfig) -> None:
    """Check the template if the config uses more than a user turn, and the model needs no download.

    Raises the errors of `check_template`.
    """
    prompt = config.prompt
    local = config.model in models.EMBEDDED or Path(config.model).expanduser().is_dir()
    if prompt.form != "chat" or not (prompt.system or prompt.shots or prompt.chat_template_kwargs) or not local:
        return
    from transformers import AutoTokenizer

    folder = models.resolve(config.model, "sampler.model")
    with models.one_line_errors(config.model, "sampler.model"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    check_template(tokenizer, prompt, config.model)


def check_template(tokenizer: Any, prompt: PromptConfig, model: str) -> None:
    """Render a prompt with the turns that the config gives each row. A log line warns if the template ignores the system text.

    Raises `UsageError` if the model has no template, or if the template refuses the turns.
    """
    if prompt.form != "chat":
        return
    if tokenizer.chat_template is None:
        raise UsageError(f"sampler.prompt.form=chat: sampler.model={model} has no chat template; set sampler.prompt.form=raw")
    shots = [prompts.Shot(instruction="a", response="b")] * prompt.shots
    turns = prompts.messages("c", shots, prompt.system)
    try:
        text = tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True, **prompt.chat_template_kwargs)
    except (TemplateError, TypeError, ValueError) as error:
        raise template_refusal(prompt, model, error) from None
    if prompt.system and prompt.system.strip() not in text:
        log(f"sampler.prompt.system: the chat template of sampler.model={model} ignores it; put the text into the instructions")


def template_refusal(prompt: PromptConfig, model: str, error: Exception) -> UsageError:
    """Return the error for a template that refuses the turns of a prompt."""
    cause = f"the chat template of sampler.model={model} refuses"
    if prompt.system:
        return UsageError(
            f"sampler.prompt.system={prompt.system[:40]!r}: {cause} the prompt with it ({first_line(error)}); "
            f"set sampler.prompt.system to null and put the text into the instructions, or set sampler.prompt.form=raw"
        )
    setting = f"sampler.prompt.shots={prompt.shots}" if prompt.shots else "sampler.prompt.form=chat"
    return UsageError(f"{setting}: {cause} the prompt ({first_line(error)}); set sampler.prompt.form=raw")
