"""`cappy plan`: count the source of a config, find the rates, and estimate the run with `generation.cost_model`.

Reads the source once and merges its repeated rows; memory holds counts per dataset. Tokens are counted for a sample of the rows. Reads a
tokenizer, a published set or a benchmark result where the config has them. Imports no Ray, loads no LLM. Writes no files, except a
temporary database of the candidates of `generate.reuse` and `generate.extend`.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from cluster.config import Config
from cluster.errors import UsageError
from cluster.progress import log
from generation import cost_model, earlier_set, prepared_units, prompts, reuse
from generation.cost_model import Count
from generation.engines.chat_template import check_template
from generation.few_shot import PreparationCounts
from generation.rates import find_rates, local_model_folder, read_measured_rates
from generation.row_plan import RowPlanner
from generation.schema import SPLITS
from generation.sources import reader
from generation.sources.merge import merge_rows
from generation.sources.row import DeadLetter, Instruction

CountTokens = Callable[[Sequence[str]], list[int]]

_BATCH = 256
_LOG_INTERVAL_S = 10.0


def run_plan(config: Config) -> dict[str, Any]:
    """Return the plan of a config: the result of `cost_model.estimate_plan`, and counts of the source.

    `dead_letters` are unusable rows, `merged` are repeated rows. `warnings` are sentences about problems of the source that the
    run would have. Raises `UsageError` or `CappyError` if the source or `plan.rates_from` cannot be read.
    """
    read_measured_rates(config)  # an error is raised before the source is counted
    prompt_tokens, text_tokens, tokens_from = _token_counters(config)
    source = count_source(config, prompt_tokens, text_tokens)
    rates = find_rates(config, cost_model.mean_context(source.counts, config))
    plan = cost_model.estimate_plan(source.counts, config, rates, tokens_from)
    unseen, sampled = source.found.unseen_references, source.found.sampled
    warnings = [prepared_units.describe_unseen(unseen, sampled, config.generate.label.metric)] if unseen else []
    warnings += rates.warnings
    splits = {split: sum(getattr(count, split) for count in source.counts.values()) for split in SPLITS}
    try:
        prepared_units.check_splits(splits, source.found, 0, config)
    except UsageError as error:
        warnings.append(f"`cappy generate` would stop: {error}")
    return {**plan, "dead_letters": source.dead_letters, "merged": source.found.merged, "warnings": warnings}


class SourceCounts(NamedTuple):
    """The counts of a source."""

    counts: dict[str, Count]
    """A `Count` for each dataset (or part of a mixture)."""
    dead_letters: int
    """Number of unusable rows."""
    found: PreparationCounts
    """The counts of repeated rows, rows to sample and their references."""


def count_source(config: Config, prompt_tokens: CountTokens, text_tokens: CountTokens) -> SourceCounts:
    """Count the rows of the source of a config, without repeated rows, with the rows of the extended set.

    Rows that `generate.reuse_only` leaves out are not counted.
    Tokens are counted for the first `plan.sample_rows` sampled rows of each; the tokens of the others are estimated from
    their bytes.

    Args:
        config: The config whose source is read.
        prompt_tokens: Returns the number of tokens of the prompt of each instruction.
        text_tokens: Returns the number of tokens of each plain text.
    """
    counters: dict[str, _DatasetCounter] = {}
    found = PreparationCounts()
    candidates = sum(each.n for each in config.sampler.decodings)
    letters = rows = only_earlier = 0
    start = last_log = time.monotonic()
    with ExitStack() as stack:
        earlier = stack.enter_context(earlier_set.open_earlier(config))
        planner = RowPlanner(config, stack.enter_context(reuse.reuse_candidates(config)), earlier)
        source = reader.read_rows(config.source, config.seed)
        if earlier is not None:
            source = earlier.follow(source)
        unique = stack.enter_context(merge_rows(source))
        found.merged = unique.merged
        for row in unique:
            if isinstance(row, DeadLetter):
                letters += 1
                continue
            planned = {"id": row.id, **{name: getattr(row, name) for name in earlier_set.ROW}}
            if not planner.plan(planned):
                continue
            only_earlier += row.part == earlier_set.PART
            name = row.part if config.source.kind == "mixture" else row.dataset
            if name not in counters:
                counters[name] = _DatasetCounter(config.plan.sample_rows, candidates, prompt_tokens, text_tokens)
            counters[name].add(row, sum(planned.get("draw", ())))
            found.add(row, config)
            rows += 1
            if rows % 1000 == 0 and time.monotonic() - last_log >= _LOG_INTERVAL_S:
                last_log = time.monotonic()
                log(f"counting: {rows:,} rows  {rows / (last_log - start):,.0f} rows/s")
    if earlier is not None:  # the other rows of the extended set were merged into rows of the source
        found.merged -= earlier.total - only_earlier
    limits = found.lengths.limits()
    return SourceCounts({name: each.result(limits) for name, each in sorted(counters.items())}, letters, found)


class _DatasetCounter:
    """The running counts of one dataset."""

    def __init__(self, limit: int, candidates: int, prompt_tokens: CountTokens, text_tokens: CountTokens) -> None:
        self._counts = Count()
        self._candidates = candidates
        self._counters = (prompt_tokens, text_tokens)
        self._uncounted = limit
        self._bytes = [0, 0]  # index 0: instructions, index 1: references; the same below
        self._counted_bytes = [0, 0]
        self._tokens = [0, 0]
        self._batch: list[Instruction] = []
        self._sampled: Counter[str] = Counter()

    def add(self, row: Instruction, draws: int) -> None:
        """Count a row; `draws` is the number of its candidates that earlier sets do not have."""
        counts = self._counts
        setattr(counts, row.split, getattr(counts, row.split) + 1)
        counts.references += len(row.references)
        if row.answer_choices is not None:
            counts.choices += len(set(row.answer_choices) - set(row.references))
            return
        counts.sampled_rows += 1
        counts.reused += self._candidates - draws
        counts.complete_rows += not draws
        self._sampled[row.dataset] += 1
        counts.sampled_references += len(row.references)
        self._bytes[0] += len(row.instruction.encode())
        self._bytes[1] += sum(len(text.encode()) for text in row.references)
        if self._uncounted:
            self._uncounted -= 1
            self._batch.append(row)
            if len(self._batch) == _BATCH:
                self._tokenize()

    def _tokenize(self) -> None:
        texts = ([row.instruction for row in self._batch], [text for row in self._batch for text in row.references])
        for kind, counter in enumerate(self._counters):
            self._tokens[kind] += sum(counter(texts[kind]))
            self._counted_bytes[kind] += sum(len(text.encode()) for text in texts[kind])
        self._batch.clear()

    def result(self, limits: Mapping[str, int]) -> Count:
        """Return the counts after the last row; call it once. `limits` has the largest length of a candidate in tokens, by dataset."""
        if self._batch:
            self._tokenize()
        self._counts.prompt_tokens, self._counts.reference_tokens = (
            tokens * whole / max(1, counted) for tokens, whole, counted in zip(self._tokens, self._bytes, self._counted_bytes, strict=True)
        )
        self._counts.limits = {name: (rows, limits[name]) for name, rows in sorted(self._sampled.items()) if name in limits}
        return self._counts


def _token_counters(config: Config) -> tuple[CountTokens, CountTokens, str]:
    """Return token counters of prompts and of texts, and a description of them.

    They use the tokenizer of the LLM if it is on this machine; otherwise they count bytes / 4.
    """
    folder = local_model_folder(config)
    if folder is None:

        def quarter_of_bytes(texts: Sequence[str]) -> list[int]:
            return [math.ceil(len(text.encode()) / 4) for text in texts]

        return quarter_of_bytes, quarter_of_bytes, f"bytes / 4: the tokenizer of {config.sampler.model} is not on this machine"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = 10**9  # suppresses the warning for long texts, which are only counted here
    prompt = config.sampler.prompt

    def text_tokens(texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]

    def prompt_tokens(texts: Sequence[str]) -> list[int]:
        turns = [prompts.messages(text, (), prompt.system) for text in texts]
        if prompt.form == "raw":
            return text_tokens([prompts.raw_text(each) for each in turns])
        variables = prompt.chat_template_kwargs
        return text_tokens(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **variables))

    check_template(tokenizer, prompt, config.sampler.model)
    return (
        prompt_tokens,
        text_tokens,
        f"its tokenizer, for up to {config.plan.sample_rows:,} rows of a dataset; estimated from bytes for the others",
    )
