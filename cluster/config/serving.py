"""Settings of `serving`: address, keys, limits, replicas, selection and early stopping."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from cluster.config.base import Section

Fallback = Literal["none", "self_score", "first"]


class ApiKeyConfig(Section):
    """A client of the server. `cappy serve --new-key NAME` prints a key and this entry for it."""

    name: str = Field(min_length=1)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """The SHA-256 of the key, in hexadecimal; the key itself stands nowhere."""
    requests_per_minute: int | None = Field(None, ge=1)
    """Requests it may send in a minute, null without limit."""
    candidates_per_minute: int | None = Field(None, ge=1)
    """Candidates it may have sampled in a minute, null without limit."""


class NamedScorer(Section):
    """A scorer served beside the main one."""

    name: str = Field(min_length=1, max_length=200)
    """What requests call it; `{model_name}+{name}` is the LLM with it."""
    path: str = Field(min_length=1)
    """As `scorer_path`: a folder, hub name or s3:// folder of a scorer, or of adapters to one."""


class Scaling(Section):
    """How many replicas a deployment has: as many as its requests want, between two limits. A plain number is that many, always."""

    min: int = Field(1, ge=0)
    """With 0 it sleeps while nobody asks; the first request then waits for the model to load."""
    max: int = Field(ge=1)
    target: float = Field(8.0, gt=0)
    """Requests in work or waiting that a replica has on average; more of them start another replica."""
    up_after_s: float = Field(10.0, ge=0)
    """Seconds more replicas must have been wanted before they start."""
    down_after_s: float = Field(300.0, ge=0)
    """Seconds fewer replicas must have been wanted before one stops."""

    @model_validator(mode="after")
    def _ordered(self) -> Scaling:
        if self.min > self.max:
            raise ValueError(f"min={self.min} is above max={self.max}")
        return self


def _always(replicas: Any) -> Any:
    return {"min": replicas, "max": replicas} if type(replicas) is int else replicas


Replicas = Annotated[Scaling, BeforeValidator(_always)]
_ONE = Scaling(max=1)


class AdaptiveConfig(Section):
    """When a request's candidates are enough before all of `serving.candidates` are drawn: see `serving/early_stopping.py`.

    Off unless one of the first two is set here or in a request. The prior says what scores the scorer gives before this
    instruction's own are known; `python -m benchmarks.adaptive` fits its mean and spread on train rows.
    """

    min_gain: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Stop when another candidate is expected to raise the best score by less, in units of the score; null or 0 never stops."""
    target_score: float | None = Field(None, allow_inf_nan=False)
    """Stop as soon as the best candidate scores this much; null never stops."""
    round_size: int = Field(4, ge=1)
    """Candidates of each round after the first, which has the greedy ones. Fewer save more tokens and take more time."""
    prior_mean: float = 0.25
    prior_std: float = Field(0.15, gt=0)
    """Of the scores of different responses to one instruction."""
    prior_weight: float = Field(2.0, gt=0)
    """Number of the instruction's own scores that count as much as the prior."""


class ServingConfig(Section):
    """The server of `cappy serve`."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    api_keys: tuple[ApiKeyConfig, ...] = ()
    """Who may ask; without any, everyone who reaches `host`."""
    allow_no_keys: bool = False
    """Whether it may listen beyond this machine without keys: behind a gateway of your own."""
    model_name: str = "cappy"
    """The name clients put in `model`: the LLM with the main scorer (`scorer_path`)."""
    scorer_name: str = "cappy-scorer"
    """The name of the main scorer alone, for the routes that score, rank and classify; they take `model_name` too."""
    llm_name: str = "cappy-llm"
    """The name of the LLM alone, whose candidates nothing scores."""
    scorers: tuple[NamedScorer, ...] = ()
    """Scorers beside the main one, loaded when a request names one."""
    adapted: bool = False
    """Whether those `cappy adapt` published in `adapted_path` are among them, each by its task's name."""
    scorers_loaded: int = Field(4, ge=1)
    """Scorers beside the main one that a replica holds at once; the one not used for longest makes room."""
    reload_s: float = Field(10.0, gt=0)
    """Seconds between looks at whether a scorer in use was published anew; its new weights then answer."""
    candidates: int = Field(8, ge=1, le=256)
    """Candidates sampled for a request that does not say how many."""
    max_candidates: int = Field(64, ge=1, le=256)
    """Largest number of candidates a request may ask for."""
    max_pairs: int = Field(1000, ge=1)
    """Largest number of pairs a request may have scored, ranked or classified."""
    max_pairs_chars: int = Field(4_000_000, ge=1)
    """Characters of a request's pairs together; a text counts in each of its pairs, because the scorer reads it in each."""
    max_prompt_chars: int = Field(200_000, ge=1)
    """Characters of a request's messages together: what is far beyond the LLM's context is refused before it costs a tokenisation."""
    max_sampled_tokens: int = Field(65_536, ge=1)
    """Largest product of candidates and the tokens each may have, over a request's decodings."""
    max_body_bytes: int = Field(1 << 20, ge=1)
    body_timeout_s: float = Field(10.0, gt=0)
    """Seconds a request's body may take to arrive."""
    selection: Literal["scorer", "blend"] = "scorer"
    """`scorer` chooses by the score alone, `blend` by score and the LLM's mean log-probability at the weight fitted with the scorer
    (by the score alone where there is no weight or no log-probability)."""
    llm_replicas: Replicas = _ONE
    """A number, or `{min, max, target, up_after_s, down_after_s}`; so are the next two."""
    scorer_replicas: Replicas = _ONE
    gateway_replicas: Replicas = _ONE
    """Gateways; each has limits of its own."""
    llm_gpus: int | None = Field(None, ge=0)
    """GPUs of an LLM replica; null is what the engine needs, or none where the cluster has none yet when the server starts."""
    scorer_gpus: float = Field(0.0, ge=0)
    """GPUs, or the share of one, a scorer replica has to itself; with 0 it uses one it sees, beside whoever else does, else the CPU."""
    scorer_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the scorers; `auto` is bfloat16 where the hardware multiplies it, which moves a score by up to about 0.01."""
    scorer_threads: int = Field(8, ge=1)
    """Threads a scorer replica computes with on CPU, as far as the machine has cores, each in a batch of its own where enough waits. Few
    threads hold up an LLM on the same cores for longer than many."""
    max_concurrency: int = Field(32, ge=1)
    """Requests a gateway works on at once."""
    max_queue: int = Field(20, ge=0)
    """Requests that may wait for their turn; the next is answered 503 at once. Fewer than are worked on, so that in an overload what is
    answered takes about twice as long as at capacity (docs/guides/serve.md, Load)."""
    timeout_s: float = Field(120.0, gt=0)
    """Seconds until a request is given up."""
    scorer_timeout_s: float = Field(30.0, gt=0)
    """Seconds until the scorer counts as late."""
    fallback: Fallback = "none"
    """What chooses when the scorer is down or late: the LLM's mean log-probability, the candidate drawn first, or nothing (503)."""
    keep_alive_s: float = Field(5.0, gt=0)
    """Seconds between the signs of life of a streamed answer while its candidates are sampled and scored."""
    access_log: bool = True
    """Whether the gateway writes a line of JSON for each request it answered, without prompts and keys, to Ray's `logs/serve` folder."""
    adaptive: AdaptiveConfig = AdaptiveConfig()

    @model_validator(mode="after")
    def _within(self) -> ServingConfig:
        if self.candidates > self.max_candidates:
            raise ValueError(f"candidates={self.candidates} is above max_candidates={self.max_candidates}")
        twice = [key.name for place, key in enumerate(self.api_keys) if key.name in [each.name for each in self.api_keys[:place]]]
        if twice:
            raise ValueError(f"api_keys has the name {twice[0]!r} twice; give each key its own")
        if self.gateway_replicas.min == 0:
            raise ValueError("gateway_replicas.min=0: nobody would be there to take the first request; use at least 1")
        check_names(self, [scorer.name for scorer in self.scorers])
        return self

    def pair(self, scorer: str) -> str:
        """Return the name of the LLM with a scorer."""
        return self.model_name if scorer == self.scorer_name else f"{self.model_name}+{scorer}"


def check_names(serving: ServingConfig, scorers: Sequence[str]) -> None:
    """Raise `ValueError` where two of a server's models, with these scorers beside the main one, have the same name."""
    settings = {"model_name": serving.model_name, "scorer_name": serving.scorer_name, "llm_name": serving.llm_name}
    taken: dict[str, str] = {}
    for setting, name in [
        *settings.items(),
        *(("scorers", name) for name in scorers),
        *(("a pair", serving.pair(name)) for name in scorers),
    ]:
        if name in taken:
            raise ValueError(f"{taken[name]} and {setting} are both {name!r}; give each its own")
        taken[name] = setting
