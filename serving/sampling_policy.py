"""How one request is sampled: prompt length, pool size, decodings, stopping rule and fallback.

Pure functions of a request and the config; imports neither Ray nor a web framework.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from cluster.config import AdaptiveConfig, Config, DecodingConfig, Fallback, SelectionMode
from generation.engines.contract import RequestDecoding
from serving.backend import ApiError
from serving.completions_api import SampleRequest
from serving.request_fields import json_preview


def check_prompt_length(texts: Iterable[str], config: Config, param: str) -> None:
    """Raise `ApiError` (400) for a prompt with more characters than `serving.max_prompt_chars`.

    The limit keeps the tokenizer fast. The LLM itself checks the number of tokens.
    """
    chars = sum(map(len, texts))
    if chars > config.serving.max_prompt_chars:
        raise ApiError(
            f"{param}: {chars:,} characters are above this server's limit of {config.serving.max_prompt_chars:,} "
            f"(serving.max_prompt_chars); send a shorter prompt",
            param=param,
            code="context_length_exceeded",
        )


def choose_pool_size(request: SampleRequest, config: Config, named: Sequence[DecodingConfig], scored: bool) -> int:
    """Return the number of candidates to sample.

    The request's `cappy.candidates` applies if it is set. Otherwise a pool that is not `scored` has `n` candidates, and `named`
    decodings that are all greedy give one candidate each. Raises `ApiError` (400) if `n`, `candidates` and the server's limit do not
    agree.
    """
    limit = config.serving.max_candidates
    asked = request.cappy.candidates
    if asked is not None and asked > limit:
        raise ApiError(
            f"cappy.candidates={asked} is above this server's limit of {limit} (serving.max_candidates); request fewer",
            param="cappy.candidates",
            code="invalid_value",
        )
    if request.n > limit:
        raise ApiError(
            f"n={request.n} is above this server's limit of {limit} candidates (serving.max_candidates); request fewer",
            param="n",
            code="invalid_value",
        )
    if asked is not None and request.n > asked:
        raise ApiError(f"n={request.n} is above cappy.candidates={asked}; request at least n candidates", param="n", code="invalid_value")
    if request.temperature == 0:
        if max(request.n, asked or 1) > 1:
            raise ApiError(
                "temperature=0 gives the same candidate every time; for several candidates or choices set a higher temperature, "
                "or none to use the server's decodings",
                param="temperature",
                code="invalid_value",
            )
        return 1
    if named and all(decoding.temperature == 0 for decoding in named):
        if max(request.n, asked or 1) > len(named):
            raise ApiError(
                f"cappy.decodings names only greedy decodings ({len(named)}), which give one candidate each; "
                "add a decoding that samples, or request fewer candidates",
                param="cappy.decodings",
                code="invalid_value",
            )
        return asked or len(named)
    return asked or (max(config.serving.candidates, request.n) if scored else request.n)


def find_named_decodings(request: SampleRequest, config: Config) -> list[DecodingConfig]:
    """Return the decodings that the request names, in the server's order; an empty list if it names none.

    Raises `ApiError` (400) for a name that the server does not have, or if the request also sets `temperature` or `top_p`.
    """
    names = request.cappy.decodings or []
    served = [decoding.name for decoding in config.sampler.decodings]
    for name in names:
        if name not in served:
            raise ApiError(
                f"cappy.decodings: {json_preview(name)} is not a decoding of this server; use {', '.join(served)}",
                param="cappy.decodings",
                code="invalid_value",
            )
    for field in ("temperature", "top_p") if names else ():
        if (value := getattr(request, field)) is not None:
            raise ApiError(
                f"{field}={value:g} and cappy.decodings both set how to sample; send only one of them",
                param="cappy.decodings",
                code="invalid_value",
            )
    return [decoding for decoding in config.sampler.decodings if decoding.name in names]


def scorer_instruction(request: SampleRequest, config: Config) -> str:
    """Return the text that the scorer reads as the instruction; see `serving.scorer_context`."""
    return request.conversation if config.serving.scorer_context == "conversation" else request.instruction


def select_decodings(request: SampleRequest, config: Config, scored: bool = True, prompts: int = 1) -> list[DecodingConfig]:
    """Return the decodings for the pool of candidates of one prompt; the sum of their `n` is the size of the pool.

    The decodings are the sampler's, or the subset that the request names. Greedy ones give one candidate each, and the others share
    the rest of the pool equally. With `temperature` or `top_p` one decoding with these values fills the pool. Raises `ApiError` (400)
    for a decoding or a constraint that the server does not have, and for candidates or tokens of all `prompts` together above the
    server's limits.
    """
    named = find_named_decodings(request, config)
    size = choose_pool_size(request, config, named, scored)
    own = named or config.sampler.decodings
    if request.temperature is not None or request.top_p is not None:
        temperature = 1.0 if request.temperature is None else request.temperature
        plain = DecodingConfig(
            name="request", temperature=temperature, top_p=request.top_p or 1.0, max_tokens=own[0].max_tokens, stop=own[0].stop
        )
        counts = [(plain, size)]
    else:
        counts = share_pool(size, own)
    decodings = [_apply_request(decoding, count, request, config) for decoding, count in counts if count]
    if prompts > 1 and prompts * size > config.serving.max_candidates:
        raise ApiError(
            f"prompt: {prompts} prompts with {size} candidates each are above this server's limit of {config.serving.max_candidates} "
            "candidates (serving.max_candidates); send fewer prompts or set cappy.candidates",
            param="prompt",
            code="invalid_value",
        )
    tokens, limit = prompts * sum(decoding.n * decoding.max_tokens for decoding in decodings), config.serving.max_sampled_tokens
    if tokens > limit:
        raise ApiError(
            f"max_tokens: {prompts * size} candidates may have {tokens:,} tokens together, above this server's limit of {limit:,} "
            f"(serving.max_sampled_tokens); request fewer or shorter candidates",
            param=request.token_limit[0],
            code="invalid_value",
        )
    return decodings


def share_pool(size: int, decodings: Sequence[DecodingConfig]) -> list[tuple[DecodingConfig, int]]:
    """Return the decodings with their numbers of candidates, `size` in all: one of each greedy decoding, and the others equally."""
    greedy = [decoding for decoding in decodings if decoding.temperature == 0][:size]
    # If all decodings are greedy, none can fill the pool, so the first one is used at temperature 1.
    others = [decoding for decoding in decodings if decoding.temperature > 0] or [
        decodings[0].model_copy(update={"name": "sample", "temperature": 1.0, "beams": 1})
    ]
    share, extra = divmod(size - len(greedy), len(others))
    counts = [(decoding, 1) for decoding in greedy]
    return counts + [(decoding, share + (position < extra)) for position, decoding in enumerate(others)]


def select_stopping_rule(request: SampleRequest, config: Config) -> AdaptiveConfig | None:
    """Return the settings that stop sampling early for a request, None to sample the whole pool."""
    options, settings = request.cappy, config.serving.adaptive
    if options.min_gain is not None or options.target_score is not None:
        settings = settings.model_copy(update={"min_gain": options.min_gain, "target_score": options.target_score})
    return active_rule(settings)


def active_rule(settings: AdaptiveConfig) -> AdaptiveConfig | None:
    """Return the settings of early stopping, or None if they never stop the sampling."""
    return settings if settings.min_gain or settings.target_score is not None else None


def select_fallback(request: SampleRequest, config: Config) -> Fallback:
    """Return how the choices are selected if the scorer fails."""
    return request.cappy.fallback or config.serving.fallback


def select_mode(request: SampleRequest, config: Config) -> SelectionMode:
    """Return how the choices are selected."""
    return request.cappy.selection or config.serving.selection


def needs_scores(request: SampleRequest, config: Config) -> bool:
    """Return whether any step reads the scores: the selection, the stopping rule, `min_score`, or the list of candidates."""
    options = request.cappy
    listed = options.return_candidates or options.progress
    return (
        select_mode(request, config) != "consensus"
        or listed
        or options.min_score is not None
        or bool(select_stopping_rule(request, config))
    )


def needs_logprobs(request: SampleRequest, config: Config, scored: bool, fitted: bool = False) -> bool:
    """Return whether any step reads the candidates' log-probabilities, which cost the LLM time to compute.

    The list of candidates, a blend, a fitted selection, the fallback `self_score` and the rule `min_gain` read them. `fitted` states
    that the scorer is known to have a fitted selection.
    """
    options = request.cappy
    if options.return_candidates or options.progress:
        return True
    mode = select_mode(request, config)
    selects = mode in ("blend", "fitted") or (mode == "scorer" and fitted) or select_fallback(request, config) == "self_score"
    stopping = select_stopping_rule(request, config)
    return scored and (selects or bool(stopping and stopping.min_gain))


def _apply_request(decoding: DecodingConfig, count: int, request: SampleRequest, config: Config) -> DecodingConfig:
    """Return a decoding with its number of candidates and the token limit and stop strings of the request."""
    name, asked = request.token_limit
    max_tokens = asked or decoding.max_tokens
    limit = config.sampler.engine.most_tokens
    if limit is not None and max_tokens > max(limit, decoding.max_tokens):
        raise ApiError(
            f"{name}={max_tokens} is above the {limit} tokens of the model's context; request fewer", param=name, code="invalid_value"
        )
    min_tokens = decoding.min_tokens if request.min_tokens is None else request.min_tokens
    if request.min_tokens is not None and min_tokens > max_tokens:
        raise ApiError(
            f"min_tokens={min_tokens} is above the {max_tokens} tokens of decoding {decoding.name}; lower it or raise {name}",
            param="min_tokens",
            code="invalid_value",
        )
    applied = decoding.model_copy(
        update={
            "n": count,
            "max_tokens": max_tokens,
            "min_tokens": min(min_tokens, max_tokens),
            "stop": tuple(dict.fromkeys((*decoding.stop, *(request.stop or ())))),
        }
    )
    if request.structured_outputs is not None:
        # The constraint alone ends a candidate: a shortest length could forbid the only allowed end, and a stop string could cut JSON.
        applied = applied.model_copy(update={"min_tokens": 0, "stop": tuple(request.stop or ())})
    return _apply_constraints(applied, request, config.sampler.engine.kind)


def _apply_constraints(decoding: DecodingConfig, request: SampleRequest, engine: str) -> DecodingConfig:
    """Return a decoding with the request's `stop_token_ids` and `structured_outputs`. Raises `ApiError` (400) unless the engine is vLLM."""
    constraints: dict[str, Any] = {}
    if request.stop_token_ids:
        constraints["stop_token_ids"] = tuple(request.stop_token_ids)
    if request.structured_outputs is not None:
        constraints["structured_outputs"] = request.structured_outputs.to_engine()
    if not constraints:
        return decoding
    if engine != "vllm":
        field = next(iter(constraints))
        raise ApiError(
            f"{field} is not supported, because this server's LLM does not run on vLLM; leave {field} out",
            param=field,
            code="unsupported_parameter",
        )
    return RequestDecoding.model_construct(**dict(decoding), **constraints)
