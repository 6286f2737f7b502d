"""`cappy plan`: count the source of a config, find the rates, and estimate the run with `generation.cost_model`.

Reads the source once and merges its repeated rows; memory holds counts per dataset. Tokens are counted for a sample of the rows. Reads a
tokenizer, a published set or a benchmark result where the config has them. Writes no files, imports no Ray, loads no LLM.
"""

from __future__ import annotations

import json
import math
import re
import struct
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cluster import artifacts, models, storage
from cluster.config import Config
from cluster.errors import UsageError
from cluster.progress import log
from generation import cost_model, prepared_units, prompts
from generation.cost_model import Count, Rates
from generation.engines.chat_template import check_template
from generation.few_shot import PreparationCounts
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
    rates = find_rates(config)
    prompt_tokens, text_tokens, tokens_from = _token_counters(config)
    source = count_source(config, prompt_tokens, text_tokens)
    plan = cost_model.estimate_plan(source.counts, config, rates, tokens_from)
    unseen, sampled = source.found.unseen_references, source.found.sampled
    warnings = [prepared_units.describe_unseen(unseen, sampled, config.generate.label.metric)] if unseen else []
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
    """Count the rows of the source of a config, without repeated rows.

    Tokens are counted for the first `plan.sample_rows` sampled rows of each; the tokens of the others are estimated from
    their bytes.

    Args:
        config: The config whose source is read.
        prompt_tokens: Returns the number of tokens of the prompt of each instruction.
        text_tokens: Returns the number of tokens of each plain text.
    """
    counters: dict[str, _DatasetCounter] = {}
    found = PreparationCounts()
    letters = rows = 0
    start = last_log = time.monotonic()
    with merge_rows(reader.read_rows(config.source, config.seed)) as unique:
        found.merged = unique.merged
        for row in unique:
            if isinstance(row, DeadLetter):
                letters += 1
                continue
            name = row.part if config.source.kind == "mixture" else row.dataset
            if name not in counters:
                counters[name] = _DatasetCounter(config.plan.sample_rows, prompt_tokens, text_tokens)
            counters[name].add(row)
            found.add(row, config)
            rows += 1
            if rows % 1000 == 0 and time.monotonic() - last_log >= _LOG_INTERVAL_S:
                last_log = time.monotonic()
                log(f"counting: {rows:,} rows  {rows / (last_log - start):,.0f} rows/s")
    limits = found.lengths.limits()
    return SourceCounts({name: each.result(limits) for name, each in sorted(counters.items())}, letters, found)


class _DatasetCounter:
    """The running counts of one dataset."""

    def __init__(self, limit: int, prompt_tokens: CountTokens, text_tokens: CountTokens) -> None:
        self._counts = Count()
        self._counters = (prompt_tokens, text_tokens)
        self._uncounted = limit
        self._bytes = [0, 0]  # index 0: instructions, index 1: references; the same below
        self._counted_bytes = [0, 0]
        self._tokens = [0, 0]
        self._batch: list[Instruction] = []
        self._sampled: Counter[str] = Counter()

    def add(self, row: Instruction) -> None:
        counts = self._counts
        setattr(counts, row.split, getattr(counts, row.split) + 1)
        counts.references += len(row.references)
        if row.answer_choices is not None:
            counts.choices += len(set(row.answer_choices) - set(row.references))
            return
        counts.sampled_rows += 1
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
    folder = _local_model_folder(config)
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


def _local_model_folder(config: Config) -> Path | None:
    """Return the folder of the LLM if it needs no download (embedded or local), else None."""
    name = config.sampler.model
    if config.sampler.engine.kind == "endpoint":
        return None
    return models.resolve(name, "sampler.model") if name in models.EMBEDDED or Path(name).expanduser().is_dir() else None


def find_rates(config: Config) -> Rates:
    """Return the rates of a config.

    A value of the `plan` section takes precedence over a measurement in `plan.rates_from`, and a measurement over a
    calculated value. Raises `UsageError` if `plan.rates_from` has no rates.
    """
    given, uri = config.plan, config.plan.rates_from
    measured = _measured_rates(storage.check_uri(uri, "plan.rates_from"), config.sampler.model) if uri else {}
    values: dict[str, float | None] = {"tokens_per_candidate": None, "bytes_per_pair": cost_model.BYTES_PER_PAIR}
    origin = {
        "tokens_per_candidate": "the mean length of the references, within min_tokens and max_tokens",
        "bytes_per_pair": "21 GB for 160M pairs; set plan.bytes_per_pair or plan.rates_from to change it",
    }
    for name in ("tokens_per_candidate", "bytes_per_pair"):
        if measured.get(name):
            values[name], origin[name] = measured[name], f"measured in {uri}"
    if given.bytes_per_pair:
        values["bytes_per_pair"], origin["bytes_per_pair"] = given.bytes_per_pair, "plan.bytes_per_pair"
    if given.sampled_tokens_per_second:
        sampled, prompt = given.sampled_tokens_per_second, given.prompt_tokens_per_second
        origin |= {"sampled": "plan.sampled_tokens_per_second", "prompt": "plan.prompt_tokens_per_second"}
    elif measured:
        sampled, prompt = measured["tokens_per_second"], None
        origin |= {
            "sampled": f"measured in {uri}{measured['note']}",
            "prompt": f"the ratio of prompt tokens to sampled tokens of that run{measured['prompts']}",
        }
    else:
        parameters, known = _model_parameters(config)
        gpus = getattr(config.sampler.engine, "tensor_parallel", 1)
        sampled = prompt = cost_model.GPU_SHARE * cost_model.GPU_FLOPS * gpus / (2 * parameters)
        reason = (
            f"a calculation, not a measurement, and too high for small models: "
            f"{cost_model.GPU_SHARE:.0%} of an H200's 990 TFLOP/s over 2 x {known}"
        )
        origin |= {"sampled": reason, "prompt": reason}
    return Rates(
        sampled=sampled,
        prompt=prompt,
        tokens_per_candidate=values["tokens_per_candidate"],
        bytes_per_pair=values["bytes_per_pair"] or cost_model.BYTES_PER_PAIR,
        origin=origin,
    )


def _measured_rates(uri: str, model: str) -> dict[str, Any]:
    """Return `tokens_per_second` of one replica, and the other rates in a published set or in the JSON of a benchmark."""
    if uri.endswith(".json"):
        result = _rates_from_benchmark(_read_json(uri))
    else:
        manifest = artifacts.read_manifest(uri, "dataset", "generate")
        result = _rates_from_set(manifest)
        other = manifest["config"]["sampler"]["model"]
        if other != model:
            result["note"] += f" with {other}, not {model}"
    if not result.get("tokens_per_second"):
        raise UsageError(f"plan.rates_from={uri} has no tokens_per_second; use a published set, or a JSON file that has it")
    return result


def _read_json(uri: str) -> Any:
    """Return the content of a JSON file, or of the last line of the saved output of a benchmark."""
    try:
        text = storage.read_bytes(uri).decode()
        return json.loads(text if text.startswith("{") else text.strip().rsplit("\n", 1)[-1])
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(f"plan.rates_from={uri} cannot be read as JSON ({type(error).__name__}); use the JSON of a benchmark") from None


def _rates_from_benchmark(result: Any) -> dict[str, Any]:
    rates = result.get("rates", result) if isinstance(result, Mapping) else {}
    kept = {name: rates.get(name) for name in ("tokens_per_second", "tokens_per_candidate", "bytes_per_pair")}
    return {**kept, "note": "", "prompts": ""}


def _rates_from_set(manifest: Mapping[str, Any]) -> dict[str, Any]:
    summary, rates = manifest["summary"], manifest.get("rates") or {}
    replicas = manifest["config"]["sampler"]["replicas"]
    sampled = summary["sources"].get("sampled", 0)
    reused = manifest.get("reused", {}).get("tokens", 0)
    whole = (summary["tokens"] - reused) / max(1.0, summary["seconds"])
    data = sum(entry["bytes"] for name, entry in manifest["files"].items() if name.startswith("data/"))
    prompt = rates.get("prompt_tokens")
    return {
        "tokens_per_second": (rates.get("tokens_per_second") or whole) / replicas,
        "tokens_per_candidate": summary["tokens"] / sampled if sampled else None,
        "bytes_per_pair": data / max(1, summary["pairs"]),
        "note": f", {replicas} replica(s)" + ("" if rates.get("tokens_per_second") else ", start of the engine included"),
        "prompts": f": {prompt / max(1, summary['tokens']):.3g}" if prompt else "",
    }


def _model_parameters(config: Config) -> tuple[float, str]:
    """Return the number of parameters that process a token, and the source of the number."""
    name = config.sampler.model
    folder = _local_model_folder(config)
    if folder is not None:
        parameters = sum(_count_parameters(file) for file in folder.glob("*.safetensors"))
        if json.loads((folder / "config.json").read_text(encoding="utf-8")).get("is_encoder_decoder"):
            return parameters / 2, f"half of {parameters / 1e9:.3g}G parameters (the encoder or the decoder processes a token)"
        return parameters, f"{parameters / 1e9:.3g}G parameters, counted"
    stated = re.search(r"(\d+(?:\.\d+)?)b(?![a-z])", name.lower())
    if stated:
        return float(stated[1]) * 1e9, f"{stated[1]}G parameters, from the name of the model"
    return 8e9, "8G parameters, assumed (no local copy of the model, no size in its name; set plan.sampled_tokens_per_second)"


def _count_parameters(file: Path) -> int:
    """Return the number of parameters in a safetensors file.

    The file starts with the length of its header, 8 bytes, then the header: JSON with the shape of each tensor.
    """
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
