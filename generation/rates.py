"""Find the rates of a plan: given by a setting, measured by an earlier run, or calculated from the size of the LLM and the device.

Reads a published set or the JSON of a benchmark, and the config and the headers of the weights of a local model. Measures the CPU of a
machine without a GPU (`cluster.hardware`). Loads no model.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster import artifacts, hardware, models, storage
from cluster.config import Config
from cluster.errors import UsageError
from cluster.hardware import Device
from generation import cost_model, speed
from generation.cost_model import MachineRates, Rates
from generation.speed import EncoderSize, LLMSize

_DEFAULT_GPU = "H200"
# Parameters of models whose names have no size.
_PARAMETERS = {
    "bart0": 406e6,
    "bart-base": 139e6,
    "bart-large": 406e6,
    "flan-t5-small": 77e6,
    "flan-t5-base": 248e6,
    "flan-t5-large": 783e6,
    "flan-t5-xl": 2.85e9,
    "flan-t5-xxl": 11.3e9,
    "t0": 11.1e9,
    "t0pp": 11.1e9,
}
# Layers, hidden size and intermediate size of encoders that need no local folder.
_ENCODERS = {
    "minilm-l6": EncoderSize(6, 384, 1536),
    "roberta-base": EncoderSize(12, 768, 3072),
    "roberta-large": EncoderSize(24, 1024, 4096),
    "bert-base-uncased": EncoderSize(12, 768, 3072),
    "bert-large-uncased": EncoderSize(24, 1024, 4096),
}


def find_rates(config: Config, context: float = 512.0) -> Rates:
    """Return the rates of a config; `context` is the mean number of tokens that a decoding step reads for a candidate.

    A value of the `plan` section takes precedence over a measurement in `plan.rates_from`, and a measurement over a calculation
    (`generation.speed`) for `plan.gpu`. Without a GPU on this machine, there is a calculation for its CPU too. Raises `UsageError` if
    `plan.rates_from` has no rates.
    """
    given, uri = config.plan, config.plan.rates_from
    measured = read_measured_rates(config)
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
    local = hardware.local_gpu()
    gpu = hardware.GPUS[given.gpu] if given.gpu else local or hardware.GPUS[_DEFAULT_GPU]
    cpu = hardware.measure_cpu() if local is None else None
    size, known = _model_size(config)
    warnings: list[str] = []
    machine: MachineRates | None = None
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
        sampled, prompt = _gpu_rates(config, size, gpu, context, known, origin, warnings)
        if cpu is not None and config.sampler.engine.kind != "endpoint":
            machine = _cpu_rates(config, size, cpu, context, known, warnings)
    if cpu is not None and machine is None and (given.sampled_tokens_per_second or measured):
        replicas = config.sampler.replicas
        machine = MachineRates(cpu.name, sampled * replicas, prompt and prompt * replicas, origin["sampled"])
    return Rates(
        sampled=sampled,
        prompt=prompt,
        tokens_per_candidate=values["tokens_per_candidate"],
        bytes_per_pair=values["bytes_per_pair"] or cost_model.BYTES_PER_PAIR,
        origin=origin,
        gpu=gpu,
        machine=machine,
        cpu=cpu,
        encoder=_encoder_size(config),
        warnings=tuple(warnings),
    )


def _gpu_rates(
    config: Config, size: LLMSize, gpu: Device, context: float, known: str, origin: dict[str, str], warnings: list[str]
) -> tuple[float, float]:
    """Return sampled and prompt tokens/s of a replica on GPUs. Adds to `origin`, and to `warnings` if the weights do not fit."""
    engine = config.sampler.engine
    gpus, share = (engine.tensor_parallel, engine.gpu_memory_utilization) if engine.kind == "vllm" else (1, 0.9)
    memory = (gpu.memory or math.inf) * share * gpus
    whole = Device(gpu.name, gpu.flops * gpus, gpu.bandwidth * gpus, memory)
    if size.weight_bytes > memory:
        needed = math.ceil(size.weight_bytes / (memory / gpus))
        warnings.append(
            f"the weights of {config.sampler.model} ({size.weight_bytes / 1e9:.3g} GB) do not fit into {gpus} {gpu.name}; "
            f"set sampler.engine.tensor_parallel={needed} or more, or another plan.gpu"
        )
    batch = speed.batch_size(size, memory, _most_candidates(config, context), context)
    sampled = speed.decoded_tokens_per_second(size, whole, batch, context, speed.STEP_S.get(engine.kind, 0.0))
    origin["sampled"] = f"calculated for {gpus} {gpu.name} from the memory traffic, {batch} candidates at a time, {known}"
    origin["prompt"] = (
        f"calculated: {speed.COMPUTE_SHARE:.0%} of {gpu.flops / 1e12:,.0f} TFLOP/s, in steps of {speed.PREFILL_TOKENS:,} tokens"
    )
    return sampled, speed.prefilled_tokens_per_second(size, whole, speed.STEP_S.get(engine.kind, 0.0))


def _cpu_rates(config: Config, size: LLMSize, cpu: Device, context: float, known: str, warnings: list[str]) -> MachineRates | None:
    """Return the rates of this machine's CPU; None, with a warning, if the weights do not fit into its memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size.weight_bytes > memory:
        warnings.append(
            f"the weights of {config.sampler.model} ({size.weight_bytes / 1e9:.3g} GB) do not fit into the memory of this machine "
            f"({memory / 1e9:.3g} GB), so there is no estimate for it"
        )
        return None
    engine = config.sampler.engine
    cache = engine.cpu_kv_cache_gib * 2**30 if engine.kind == "vllm" else None
    room = None if cache is None else cache + size.weight_bytes
    batch = speed.batch_size(size, room, _most_candidates(config, context), context)
    return MachineRates(
        cpu.name,
        speed.decoded_tokens_per_second(size, cpu, batch, context),
        speed.prefilled_tokens_per_second(size, cpu),
        f"calculated from {cpu.flops / 1e9:,.0f} GFLOP/s and {cpu.bandwidth / 1e9:.3g} GB/s, measured now, {batch} candidates at a time, "
        f"{known}",
    )


def _most_candidates(config: Config, context: float) -> int:
    """Return how many candidates an engine decodes at a time."""
    engine = config.sampler.engine
    if engine.kind == "vllm":
        return engine.max_num_seqs
    return max(1, int(engine.batch_tokens / max(context, 1.0))) if engine.kind == "transformers" else 1


def read_measured_rates(config: Config) -> dict[str, Any]:
    """Return `tokens_per_second` of one replica, and the other rates in `plan.rates_from`; an empty dict if it is not set.

    It is a published set or the JSON of a benchmark. Raises `UsageError` if it has no rates.
    """
    if not config.plan.rates_from:
        return {}
    uri, model = storage.check_uri(config.plan.rates_from, "plan.rates_from"), config.sampler.model
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
    reused = sum(manifest.get(name, {}).get("tokens", 0) for name in ("reused", "extends"))
    # The seconds of a combined or relabelled set are not those of its sampling.
    whole = 0.0 if {"combines", "relabelled_from"} & manifest.keys() else (summary["tokens"] - reused) / max(1.0, summary["seconds"])
    data = sum(entry["bytes"] for name, entry in manifest["files"].items() if name.startswith("data/"))
    prompt = rates.get("prompt_tokens")
    return {
        "tokens_per_second": (rates.get("tokens_per_second") or whole) / replicas,
        "tokens_per_candidate": summary["tokens"] / sampled if sampled else None,
        "bytes_per_pair": data / max(1, summary["pairs"]),
        "note": f", {replicas} replica(s)" + ("" if rates.get("tokens_per_second") else ", start of the engine included"),
        "prompts": f": {prompt / max(1, summary['tokens']):.3g}" if prompt else "",
    }


def _model_size(config: Config) -> tuple[LLMSize, str]:
    """Return the size of the LLM, and the source of the number of its parameters."""
    name = config.sampler.model
    folder = local_model_folder(config)
    if folder is not None:
        parameters = float(sum(_count_parameters(file) for file in folder.glob("*.safetensors")))
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kv_bytes = _kv_bytes(settings) or speed.guess_kv_bytes(parameters)
        size, known = LLMSize(parameters, kv_bytes), f"{parameters / 1e9:.3g}G parameters, counted"
        split = bool(settings.get("is_encoder_decoder"))
    else:
        parameters, known = _named_parameters(name)
        size = LLMSize(parameters, speed.guess_kv_bytes(parameters))
        split = config.sampler.engine.kind == "transformers"
    if not split:
        return size, known
    return (
        LLMSize(size.parameters / 2, size.kv_bytes),
        f"half of {size.parameters / 1e9:.3g}G parameters (the encoder or the decoder processes a token)",
    )


def _named_parameters(name: str) -> tuple[float, str]:
    """Return the number of parameters by the name of a model, and the source of the number."""
    name = name.lower().partition("@")[0]
    known = _PARAMETERS.get(name.rpartition("/")[2])
    if known:
        return known, f"{known / 1e9:.3g}G parameters, by a table"
    stated = re.search(r"(\d+(?:\.\d+)?)([bm])(?![a-z])", name)
    if stated:
        parameters = float(stated[1]) * (1e9 if stated[2] == "b" else 1e6)
        return parameters, f"{parameters / 1e9:.3g}G parameters, from the name of the model"
    return 8e9, "8G parameters, assumed (no local copy of the model, no size in its name; set plan.sampled_tokens_per_second)"


def _kv_bytes(settings: Mapping[str, Any]) -> float | None:
    """Return the bytes of the KV cache per token, by the config of a model: keys and values of each decoder layer, 2 bytes a number."""
    layers = settings.get("num_hidden_layers") or settings.get("decoder_layers") or settings.get("num_layers")
    heads = settings.get("num_attention_heads") or settings.get("num_heads")
    width = settings.get("hidden_size") or settings.get("d_model")
    if not (layers and heads and width):
        return None
    kv_heads = settings.get("num_key_value_heads") or heads
    return float(2 * 2 * layers * kv_heads * (settings.get("head_dim") or settings.get("d_kv") or width / heads))


def _encoder_size(config: Config) -> EncoderSize | None:
    """Return the size of the encoder of `scorer.encoder`: of a known name or of a local folder; None if it is not known."""
    name = config.scorer.encoder
    known = _ENCODERS.get(name.rpartition("/")[2].partition("@")[0].lower())
    folder = Path(name).expanduser() / "config.json"
    if known or not folder.is_file():
        return known
    try:
        settings = json.loads(folder.read_text(encoding="utf-8"))
        return EncoderSize(*(int(settings[key]) for key in ("num_hidden_layers", "hidden_size", "intermediate_size")))
    except (OSError, ValueError, KeyError, TypeError):  # `cappy train` reports the problem
        return None


def local_model_folder(config: Config) -> Path | None:
    """Return the folder of the LLM if it needs no download (embedded or local), else None."""
    name = config.sampler.model
    if config.sampler.engine.kind == "endpoint":
        return None
    return models.resolve(name, "sampler.model") if name in models.EMBEDDED or Path(name).expanduser().is_dir() else None


def _count_parameters(file: Path) -> int:
    """Return the number of parameters in a safetensors file.

    The file starts with the length of its header, 8 bytes, then the header: JSON with the shape of each tensor.
    """
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
