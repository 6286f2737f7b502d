"""`cappy plan` at its edge: count what a source holds, count tokens of a part of it, find the rates, hand both to `plan`.

The source is read once, streaming; of each dataset only counts are held. Writes nothing and loads no LLM.
"""

from __future__ import annotations

import json
import math
import re
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster import models, storage
from cluster.config import Config
from cluster.errors import CappyError, UsageError
from cluster.progress import log
from generation import cost_model, prompts
from generation.cost_model import Count, Rates
from generation.sources import reader
from generation.sources.row import DeadLetter, Instruction

CountTokens = Callable[[Sequence[str]], list[int]]

_BATCH = 256
_LOG_INTERVAL_S = 10.0


def run_plan(config: Config) -> dict[str, Any]:
    """Return the plan of a config; see `cost_model.estimate_plan`, and `dead_letters`, the rows the source has that cannot be used.

    Raises `UsageError` or `CappyError` where the source or `plan.rates_from` cannot be read.
    """
    rates = find_rates(config)
    of_prompts, of_texts, tokens_from = _token_counters(config)
    counts, letters = count_source(config, of_prompts, of_texts)
    return {**cost_model.estimate_plan(counts, config, rates, tokens_from), "dead_letters": letters}


def count_source(config: Config, of_prompts: CountTokens, of_texts: CountTokens) -> tuple[dict[str, Count], int]:
    """Return a `Count` for each dataset (or part of a mixture), and the number of unusable rows.

    Tokens are counted for `plan.sample_rows` sampled rows of each; the others' follow from their bytes. `of_prompts` counts
    the tokens of instructions as prompts, `of_texts` of plain texts.
    """
    found: dict[str, _DatasetCounter] = {}
    letters = rows = 0
    start = news = time.monotonic()
    for row in reader.read_rows(config.source, config.seed):
        if isinstance(row, DeadLetter):
            letters += 1
            continue
        name = row.part if config.source.kind == "mixture" else row.dataset
        if name not in found:
            found[name] = _DatasetCounter(config.plan.sample_rows, of_prompts, of_texts)
        found[name].add(row)
        rows += 1
        if rows % 1000 == 0 and time.monotonic() - news >= _LOG_INTERVAL_S:
            news = time.monotonic()
            log(f"counting: {rows:,} rows  {rows / (news - start):,.0f} rows/s")
    return {name: each.result() for name, each in sorted(found.items())}, letters


class _DatasetCounter:
    """The counts of one dataset as its rows come."""

    def __init__(self, limit: int, of_prompts: CountTokens, of_texts: CountTokens) -> None:
        self._counts = Count()
        self._counters = (of_prompts, of_texts)
        self._left = limit
        self._bytes = [0, 0]  # of instructions, of references
        self._counted_bytes = [0, 0]
        self._tokens = [0, 0]
        self._waiting: list[Instruction] = []

    def add(self, row: Instruction) -> None:
        counts = self._counts
        setattr(counts, row.split, getattr(counts, row.split) + 1)
        counts.references += len(row.references)
        if row.answer_choices is not None:
            counts.choices += len(set(row.answer_choices) - set(row.references))
            return
        counts.sampled_rows += 1
        counts.sampled_references += len(row.references)
        self._bytes[0] += len(row.instruction.encode())
        self._bytes[1] += sum(len(text.encode()) for text in row.references)
        if self._left:
            self._left -= 1
            self._waiting.append(row)
            if len(self._waiting) == _BATCH:
                self._tokenize()

    def _tokenize(self) -> None:
        texts = ([row.instruction for row in self._waiting], [text for row in self._waiting for text in row.references])
        for kind, counter in enumerate(self._counters):
            self._tokens[kind] += sum(counter(texts[kind]))
            self._counted_bytes[kind] += sum(len(text.encode()) for text in texts[kind])
        self._waiting.clear()

    def result(self) -> Count:
        """The counts, once all rows are in."""
        if self._waiting:
            self._tokenize()
        self._counts.prompt_tokens, self._counts.reference_tokens = (
            tokens * whole / max(1, counted) for tokens, whole, counted in zip(self._tokens, self._bytes, self._counted_bytes, strict=True)
        )
        return self._counts


def _token_counters(config: Config) -> tuple[CountTokens, CountTokens, str]:
    """Counters of prompts and of texts, and what they are: the LLM's tokenizer where it is on this machine, else bytes / 4."""
    folder = _local_model_folder(config)
    if folder is None:

        def quarter(texts: Sequence[str]) -> list[int]:
            return [math.ceil(len(text.encode()) / 4) for text in texts]

        return quarter, quarter, f"bytes / 4: the tokenizer of {config.sampler.model} is not on this machine"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = 10**9  # no warning for a long text: it is only counted
    prompt = config.sampler.prompt

    def of_texts(texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]

    def of_prompts(texts: Sequence[str]) -> list[int]:
        turns = [prompts.messages(text, (), prompt.system) for text in texts]
        if prompt.form == "raw":
            return of_texts([prompts.raw_text(each) for each in turns])
        return of_texts(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    if prompt.form == "chat" and tokenizer.chat_template is None:
        raise CappyError("sampler.prompt.form=chat, yet the model has no chat template; set sampler.prompt.form=raw")
    return of_prompts, of_texts, f"its tokenizer, on up to {config.plan.sample_rows:,} rows of a dataset; the others by their bytes"


def _local_model_folder(config: Config) -> Path | None:
    """The LLM's folder where it needs no download: embedded, or local."""
    name = config.sampler.model
    if config.sampler.engine.kind == "endpoint":
        return None
    return models.resolve(name, "sampler.model") if name in models.EMBEDDED or Path(name).expanduser().is_dir() else None


def find_rates(config: Config) -> Rates:
    """Return the rates of a config: what its `plan` gives, else what `plan.rates_from` measured, else calculated ones.

    Raises `UsageError` where `plan.rates_from` holds none.
    """
    given, uri = config.plan, config.plan.rates_from
    measured = _measured_rates(storage.check_uri(uri, "plan.rates_from"), config.sampler.model) if uri else {}
    values: dict[str, float | None] = {"tokens_per_candidate": None, "bytes_per_pair": cost_model.BYTES_PER_PAIR}
    origin = {
        "tokens_per_candidate": "the mean reference is taken for its length, within min_tokens and max_tokens",
        "bytes_per_pair": "21 GB for 160M pairs; plan.bytes_per_pair or plan.rates_from changes it",
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
        origin |= {"sampled": f"measured in {uri}{measured['note']}", "prompt": f"as many a sampled token as there{measured['prompts']}"}
    else:
        parameters, known = _model_parameters(config)
        gpus = getattr(config.sampler.engine, "tensor_parallel", 1)
        sampled = prompt = cost_model.GPU_SHARE * cost_model.GPU_FLOPS * gpus / (2 * parameters)
        reason = (
            f"a calculation, not a measurement, and too fast for small models: "
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
    """`tokens_per_second` of one replica, and what else a published set or a benchmark's JSON tells."""
    if uri.endswith(".json"):
        result = _rates_from_benchmark(_read_json(uri))
    else:
        manifest = storage.read_manifest(uri, "dataset", "generate")
        result = _rates_from_set(manifest)
        other = manifest["config"]["sampler"]["model"]
        if other != model:
            result["note"] += f" with {other}, not {model}"
    if not result.get("tokens_per_second"):
        raise UsageError(f"plan.rates_from={uri} has no tokens_per_second; give a published set, or a JSON file with it")
    return result


def _read_json(uri: str) -> Any:
    """A JSON file, or the last line of a benchmark's output kept in one."""
    try:
        text = storage.read_bytes(uri).decode()
        return json.loads(text if text.startswith("{") else text.strip().rsplit("\n", 1)[-1])
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(f"plan.rates_from={uri} cannot be read as JSON ({type(error).__name__}); give a benchmark's result") from None


def _rates_from_benchmark(found: Any) -> dict[str, Any]:
    rates = found.get("rates", found) if isinstance(found, Mapping) else {}
    kept = {name: rates.get(name) for name in ("tokens_per_second", "tokens_per_candidate", "bytes_per_pair")}
    return {**kept, "note": "", "prompts": ""}


def _rates_from_set(manifest: Mapping[str, Any]) -> dict[str, Any]:
    summary, rates = manifest["summary"], manifest.get("rates") or {}
    replicas = manifest["config"]["sampler"]["replicas"]
    sampled = summary["sources"].get("sampled", 0)
    whole = summary["tokens"] / max(1.0, summary["seconds"])
    data = sum(entry["bytes"] for name, entry in manifest["files"].items() if name.startswith("data/"))
    prompt = rates.get("prompt_tokens")
    return {
        "tokens_per_second": (rates.get("tokens_per_second") or whole) / replicas,
        "tokens_per_candidate": summary["tokens"] / sampled if sampled else None,
        "bytes_per_pair": data / max(1, summary["pairs"]),
        "note": f", {replicas} replica(s)" + ("" if rates.get("tokens_per_second") else ", start-up included"),
        "prompts": f": {prompt / max(1, summary['tokens']):.3g}" if prompt else "",
    }


def _model_parameters(config: Config) -> tuple[float, str]:
    """How many parameters a token passes, and how that is known."""
    name = config.sampler.model
    folder = _local_model_folder(config)
    if folder is not None:
        parameters = sum(_count_parameters(file) for file in folder.glob("*.safetensors"))
        if json.loads((folder / "config.json").read_text(encoding="utf-8")).get("is_encoder_decoder"):
            return parameters / 2, f"half of {parameters / 1e9:.3g}G parameters (a token passes the encoder or the decoder)"
        return parameters, f"{parameters / 1e9:.3g}G parameters, counted"
    told = re.search(r"(\d+(?:\.\d+)?)b(?![a-z])", name.lower())
    if told:
        return float(told[1]) * 1e9, f"{told[1]}G parameters, by the model's name"
    return 8e9, "8G parameters, assumed (the model is not here, its name does not tell; set plan.sampled_tokens_per_second)"


def _count_parameters(file: Path) -> int:
    """The parameters in a safetensors file, from its header: its length in 8 bytes, then JSON with each tensor's shape."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
