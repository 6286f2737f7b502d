"""Sampling engines: one protocol (`contract`) and one engine for each `sampler.engine.kind`. Imports no Ray.

| kind | module | used for |
| --- | --- | --- |
| vllm | `vllm` | decoder-only models on this machine |
| transformers | `seq2seq` | encoder-decoder models on this machine |
| endpoint | `endpoint` | any server with an OpenAI-compatible API |

An engine loads its model in `__init__`, so construct it in an actor or a Serve replica. One `sample` call draws the candidates of one
prompt with one decoding. Calls may run concurrently; the engine batches them.
"""

from __future__ import annotations

import math
from typing import Any

from cluster import models
from cluster.config import SamplerConfig
from generation.engines.contract import ServedLLM, read_api_key


def load_engine(config: SamplerConfig, max_wait_s: float = math.inf) -> ServedLLM:
    """Load and return the engine of a sampler config.

    Args:
        config: the sampler settings.
        max_wait_s: seconds that a request may wait for the rate limits of an endpoint; local engines ignore it.
    """
    options: dict[str, Any] = {"keep_reasoning": config.reasoning == "keep", "template_kwargs": config.prompt.chat_template_kwargs}
    # Imported here, because a process needs only one of the engines.
    if config.engine.kind == "transformers":
        from generation.engines.seq2seq import Seq2SeqEngine

        return Seq2SeqEngine(config.model, config.engine, **options)
    if config.engine.kind == "endpoint":
        from generation.engines.endpoint import EndpointEngine

        return EndpointEngine(config.model, config.engine, max_wait_s, **options)
    from generation.engines.vllm import VLLMEngine

    return VLLMEngine(config.model, config.engine, **options)


def check_sampler_config(config: SamplerConfig) -> None:
    """Check model and chat template, or address and API key, without loading the LLM. Raises the errors of `load_engine`."""
    if config.engine.kind == "endpoint":
        from generation.engines.endpoint_client import open_http

        open_http(config.engine, read_api_key(config.engine.api_key_env))
    else:
        from generation.engines.chat_template import check_local_template

        models.check_model(config.model, "sampler.model")
        check_local_template(config)


def cost_limit(config: SamplerConfig) -> float | None:
    """Return the maximum cost of a whole run in dollars, or None if there is no limit."""
    return config.engine.max_cost if config.engine.kind == "endpoint" else None


def actor_resources(config: SamplerConfig, cluster_gpus: float) -> dict[str, float]:
    """Return the Ray resources of one sampling actor.

    Args:
        config: the sampler settings.
        cluster_gpus: number of GPUs in the cluster; with 0 all engines run on CPUs.
    """
    gpus = config.engine.tensor_parallel if config.engine.kind == "vllm" else int(config.engine.kind == "transformers")
    return {"num_cpus": 1, "num_gpus": gpus if cluster_gpus else 0}
