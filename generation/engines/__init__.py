"""What samples: one contract, and an engine for each `sampler.engine.kind`. Knows no Ray.

| kind | module | for |
| --- | --- | --- |
| vllm | `vllm` | decoder-only models here |
| transformers | `seq2seq` | encoder-decoder models here |
| endpoint | `endpoint` | any server of the OpenAI protocol |

An engine loads in `__init__`, so it belongs in an actor or a Serve replica. A call draws the candidates of one prompt and one
decoding; calls overlap, and the engine batches them as it sees fit.
"""

from __future__ import annotations

import math

from cluster import models
from cluster.config import SamplerConfig
from generation.engines.contract import ServedLLM, read_api_key


def load_engine(config: SamplerConfig, max_wait_s: float = math.inf) -> ServedLLM:
    """Return the engine of a sampler config; `max_wait_s` is how long a request may wait for an endpoint to take it."""
    # Each imported where it is wanted: a process needs one of them.
    if config.engine.kind == "transformers":
        from generation.engines.seq2seq import Seq2SeqEngine

        return Seq2SeqEngine(config.model, config.engine)
    if config.engine.kind == "endpoint":
        from generation.engines.endpoint import EndpointEngine

        return EndpointEngine(config.model, config.engine, max_wait_s)
    from generation.engines.vllm import VLLMEngine

    return VLLMEngine(config.model, config.engine)


def check_sampler_config(config: SamplerConfig) -> None:
    """Raise what `load` would for a model or key that cannot be there, without loading anything."""
    if config.engine.kind == "endpoint":
        read_api_key(config.engine.api_key_env)
    else:
        models.check_model(config.model, "sampler.model")


def cost_limit(config: SamplerConfig) -> float | None:
    """Return the dollars a whole run may cost, or None where nothing limits it."""
    return config.engine.max_cost if config.engine.kind == "endpoint" else None


def actor_resources(config: SamplerConfig, cluster_gpus: float) -> dict[str, float]:
    """Return what one sampling actor asks Ray for; `cluster_gpus` counts the cluster's GPUs, 0 has all run on CPUs."""
    gpus = config.engine.tensor_parallel if config.engine.kind == "vllm" else int(config.engine.kind == "transformers")
    return {"num_cpus": 1, "num_gpus": gpus if cluster_gpus else 0}
