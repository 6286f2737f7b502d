"""Calls of an `EndpointEngine` on the loopback server, in one line each."""

from __future__ import annotations

import asyncio
import math

from cluster.config import DecodingConfig, EndpointConfig
from generation.engines.endpoint import EndpointEngine
from generation.prompts import messages

WARM = DecodingConfig(name="warm", n=3, temperature=0.7, top_p=0.9, max_tokens=8, stop=("\n",))
ONE = DecodingConfig(name="one", max_tokens=8)
TURNS = messages("Which fox?", system="Be brief.")


def endpoint(server, max_wait_s=math.inf, keep_reasoning=False, template_kwargs=None, **settings):
    config = EndpointConfig(kind="endpoint", base_url=server.url, **settings)
    return EndpointEngine("fox-1", config, max_wait_s, keep_reasoning=keep_reasoning, template_kwargs=template_kwargs)


def samples(llm, *decodings, form="chat", seed=5, **how):
    """Return the candidates of the same prompt for each decoding, from consecutive calls."""

    async def collect():
        return [await llm.sample(llm.encode(TURNS, form, 8), decoding, seed, "row-1", **how) for decoding in decodings]

    return asyncio.run(collect())


def sample(llm, decoding=ONE, form="chat"):
    return samples(llm, decoding, form=form)[0]
