"""How one request is sampled: prompt length, pool size, decodings, stopping rule and fallback.

Pure functions of a request and the config; imports neither Ray nor a web framework.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cluster.config import AdaptiveConfig, Config, DecodingConfig, Fallback
from serving.backend import ApiError
from serving.completions_api import SampleRequest, json_preview


def check_prompt_length(texts: Iterable[str], config: Config, param: str) -> None:
    """Raise `ApiError` (400) for a prompt no tokenizer should be troubled with; the LLM itself counts tokens."""
    chars = sum(map(len, texts))
    if chars > config.serving.max_prompt_chars:
        raise ApiError(
            f"{param}: {chars:,} characters are above this server's limit of {config.serving.max_prompt_chars:,} "
            f"(serving.max_prompt_chars); shorten them",
            param=param,
            code="context_length_exceeded",
        )


def choose_pool_size(request: SampleRequest, config: Config, named: Sequence[DecodingConfig], scored: bool) -> int:
    """Return how many candidates to sample: of a pool that is not `scored` no more than `n`, unless asked; of `named` decodings that
    are all greedy one each.

    Raises `ApiError` (400) where `n`, `candidates` and the server's limit do not fit.
    """
    limit = config.serving.max_candidates
    asked = request.cappy.candidates
    if asked is not None and asked > limit:
        raise ApiError(f"cappy.candidates={asked} is above this server's limit of {limit}", param="cappy.candidates", code="invalid_value")
    if request.n > limit:
        raise ApiError(f"n={request.n} is above this server's limit of {limit} candidates", param="n", code="invalid_value")
    if asked is not None and request.n > asked:
        raise ApiError(
            f"n={request.n} choices cannot come out of cappy.candidates={asked}; ask for more candidates", param="n", code="invalid_value"
        )
    if request.temperature == 0:
        if max(request.n, asked or 1) > 1:
            raise ApiError(
                "temperature=0 draws the same candidate every time; with more than one candidate or choice give a higher temperature, "
                "or none to use the server's decodings",
                param="temperature",
                code="invalid_value",
            )
        return 1
    if named and all(decoding.temperature == 0 for decoding in named):
        if max(request.n, asked or 1) > len(named):
            raise ApiError(
                f"the {len(named)} of cappy.decodings are greedy and draw one candidate each; name one that samples too, or ask for less",
                param="cappy.decodings",
                code="invalid_value",
            )
        return asked or len(named)
    return asked or (max(config.serving.candidates, request.n) if scored else request.n)


def find_named_decodings(request: SampleRequest, config: Config) -> list[DecodingConfig]:
    """Return the decodings the request names, in the server's order; none where it names none.

    Raises `ApiError` (400) for a name the server does not have, or where the request says beside how to sample.
    """
    names = request.cappy.decodings or []
    served = [decoding.name for decoding in config.sampler.decodings]
    for name in names:
        if name not in served:
            raise ApiError(
                f"cappy.decodings: {json_preview(name)} is not one of this server's: {', '.join(served)}",
                param="cappy.decodings",
                code="invalid_value",
            )
    for field in ("temperature", "top_p") if names else ():
        if (value := getattr(request, field)) is not None:
            raise ApiError(
                f"{field}={value:g} and cappy.decodings both say how to sample; give one of them",
                param="cappy.decodings",
                code="invalid_value",
            )
    return [decoding for decoding in config.sampler.decodings if decoding.name in names]


def select_decodings(request: SampleRequest, config: Config, scored: bool = True) -> list[DecodingConfig]:
    """Return the decodings whose `n` add up to the request's pool of candidates.

    They are the sampler's own, or those of them the request names: greedy ones first with one candidate each, then the others in turn, one
    candidate a round, so that the pool is as varied as its size allows. With `temperature` or `top_p` the whole pool is drawn as they say.
    Raises `ApiError` (400) for a pool, a token limit or the product of both beyond what the server allows, and for such names.
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
        greedy = [decoding for decoding in own if decoding.temperature == 0][:size]
        # A sampler with greedy decodings alone has nothing to fill a pool with: its first one is then drawn at temperature 1.
        others = [decoding for decoding in own if decoding.temperature > 0] or [
            own[0].model_copy(update={"name": "sample", "temperature": 1.0, "beams": 1})
        ]
        share, extra = divmod(size - len(greedy), len(others))
        counts = [(decoding, 1) for decoding in greedy]
        counts += [(decoding, share + (position < extra)) for position, decoding in enumerate(others)]
    decodings = [_apply_request(decoding, count, request, config) for decoding, count in counts if count]
    tokens, limit = sum(decoding.n * decoding.max_tokens for decoding in decodings), config.serving.max_sampled_tokens
    if tokens > limit:
        raise ApiError(
            f"max_tokens: {size} candidates may have {tokens:,} tokens together, above this server's limit of {limit:,} "
            f"(serving.max_sampled_tokens); ask for fewer or shorter ones",
            param=request.token_limit[0],
            code="invalid_value",
        )
    return decodings


def select_stopping_rule(request: SampleRequest, config: Config) -> AdaptiveConfig | None:
    """Return when the request's candidates are enough, None where all are to be drawn."""
    options, settings = request.cappy, config.serving.adaptive
    if options.min_gain is not None or options.target_score is not None:
        settings = settings.model_copy(update={"min_gain": options.min_gain, "target_score": options.target_score})
    return settings if settings.min_gain or settings.target_score is not None else None


def select_fallback(request: SampleRequest, config: Config) -> Fallback:
    """Return what chooses for a request when the scorer cannot."""
    return request.cappy.fallback or config.serving.fallback


def needs_logprobs(request: SampleRequest, config: Config, scored: bool) -> bool:
    """Return whether anything reads the candidates' log-probabilities, which take the LLM's time.

    They are shown with the candidates, choose in a blend and in a fallback to them, and tell drawing by `min_gain` of repeats.
    """
    options = request.cappy
    if options.return_candidates or options.progress:
        return True
    chooses = config.serving.selection == "blend" or select_fallback(request, config) == "self_score"
    stopping = select_stopping_rule(request, config)
    return scored and (chooses or bool(stopping and stopping.min_gain))


def _apply_request(decoding: DecodingConfig, count: int, request: SampleRequest, config: Config) -> DecodingConfig:
    """Give a decoding its number of candidates and the request's own length and stop strings."""
    name, asked = request.token_limit
    max_tokens = asked or decoding.max_tokens
    most = config.sampler.engine.most_tokens
    if most is not None and max_tokens > max(most, decoding.max_tokens):
        raise ApiError(f"{name}={max_tokens} is above the {most} tokens the model has room for", param=name, code="invalid_value")
    return decoding.model_copy(
        update={
            "n": count,
            "max_tokens": max_tokens,
            "min_tokens": min(decoding.min_tokens, max_tokens),
            "stop": tuple(dict.fromkeys((*decoding.stop, *(request.stop or ())))),
        }
    )
