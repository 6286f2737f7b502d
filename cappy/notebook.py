"""`cappy.answer` for a list of prompts: boosted decoding on this machine, with a DataFrame as the result."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import models, storage
from cluster.config import Config, load
from cluster.errors import UsageError

if TYPE_CHECKING:
    import pandas

Prompt = str | Sequence[Mapping[str, Any]] | Mapping[str, Any]
"""A prompt: a text, a chat (turns with `role` and `content`), or a row with an instruction and further columns."""

_NUMBER = "prompt_number"


def answer_prompts(
    prompts: Sequence[Prompt],
    llm: str | None = None,
    scorer: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> pandas.DataFrame:
    """Answer a list of prompts; return a row for each prompt, in order, with the columns of published answers.

    A prompt that cannot be answered has a null `response`, and the reason is in the column `error`.

    Args:
        prompts: The prompts.
        llm: `sampler.model`; None takes the model of the settings.
        scorer: `scorer_path`; None takes the scorer of the settings, else the scorer of the package.
        settings: Other settings by dotted key, e.g. `{"answer.candidates": 8}`.
        **options: Passed to `serving.answer.run_answer`.

    Raises `UsageError` if there are no prompts, or one has another type.
    """
    import pandas

    from serving.answer import run_answer

    rows = [_as_row(number, prompt) for number, prompt in enumerate(prompts)]
    if not rows:
        raise UsageError("prompts=[]: there is nothing to answer; give at least one prompt")
    given = dict(settings or {})
    given |= {"sampler.model": llm} if llm is not None else {}
    given |= {"scorer_path": str(scorer)} if scorer is not None else {}
    with tempfile.TemporaryDirectory(prefix="cappy-answer-") as folder:
        file = Path(folder, "prompts.jsonl")
        file.write_text("".join(json.dumps(row, default=str) + "\n" for row in rows), encoding="utf-8")
        places = {"workspace": f"{folder}/workspace", "answers_path": f"{folder}/answers"}
        source = {"kind": "files", "path": str(file), "validation_fraction": 0}
        # A failed prompt must not take the answers of the others.
        config = load(None, {"generate.max_error_rate": 1.0, **given, **places, "source": source})
        run_answer(_absolute_models(config), **options)
        answers = pandas.read_parquet(f"{folder}/answers/data/answers").set_index(_NUMBER)
        letters = [json.loads(line) for line in Path(folder, "answers", "dead_letters.jsonl").read_text(encoding="utf-8").splitlines()]
    found = answers.reindex(range(len(rows)))
    found["error"] = pandas.Series(dict(filter(None, map(_error_of, letters))), dtype="object")
    return found.reset_index(drop=True)


def _as_row(number: int, prompt: Prompt) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"instruction": prompt, _NUMBER: number}
    if isinstance(prompt, Mapping):
        return {**prompt, _NUMBER: number}
    if isinstance(prompt, Sequence) and all(isinstance(turn, Mapping) for turn in prompt):
        return {"messages": list(prompt), _NUMBER: number}
    raise UsageError(f"prompts[{number}] is a {type(prompt).__name__}; give a text, a chat (a list of turns) or a row (a dict)")


def _absolute_models(config: Config) -> Config:
    """Return the config with absolute paths of local models, because the workers have another working directory."""
    scorer = config.scorer_path
    paths = {"scorer_path": scorer if scorer is None or storage.is_s3(scorer) else models.absolute(scorer)}
    if config.sampler.engine.kind != "endpoint":
        paths["sampler"] = config.sampler.model_copy(update={"model": models.absolute(config.sampler.model)})  # type: ignore[assignment]
    return config.model_copy(update=paths)


def _error_of(letter: Mapping[str, str]) -> tuple[int, str] | None:
    """Return the number of the prompt of a dead letter and the reason; None if the letter does not have it."""
    line = letter["where"].rpartition(":")[2]
    if letter["stage"] == "read" and line.isdigit():
        return int(line) - 1, letter["reason"]
    found = re.search(rf'"{_NUMBER}": (\d+)', letter["row"])
    return (int(found[1]), letter["reason"]) if found else None
