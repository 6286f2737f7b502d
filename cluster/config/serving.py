"""Settings of `serving`: address, keys, limits, replicas, selection and early stopping. Imports no server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from cluster.config.base import Section

Fallback = Literal["none", "self_score", "consensus", "first"]
SelectionMode = Literal["scorer", "score", "fitted", "consensus", "blend"]


class ApiKeyConfig(Section):
    """A client of the server. `cappy serve --new-key NAME` prints a key and this entry for it."""

    name: str = Field(min_length=1)
    """Name of the client, for the access log and the metrics."""
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """The SHA-256 of the key in hexadecimal. The key itself is never stored."""
    requests_per_minute: int | None = Field(None, ge=1)
    """Rate limit of the client's requests; null means unlimited."""
    candidates_per_minute: int | None = Field(None, ge=1)
    """Rate limit of the candidates sampled for the client; null means unlimited."""


class NamedScorer(Section):
    """A scorer that is served beside the main scorer."""

    name: str = Field(min_length=1, max_length=200)
    """Name of the scorer in requests. `{model_name}+{name}` is the LLM with this scorer."""
    path: str = Field(min_length=1)
    """A folder, hub name or s3:// folder of a scorer, or of adapters to a scorer."""


class Scaling(Section):
    """Autoscaling of a deployment between two numbers of replicas. A plain number is a fixed number of replicas."""

    min: int = Field(1, ge=0)
    """Smallest number of replicas. 0 scales the deployment to zero when idle; the next request then waits until the model is loaded."""
    max: int = Field(ge=1)
    """Largest number of replicas."""
    target: float = Field(8.0, gt=0)
    """Target for the mean number of running and queued requests per replica. Above it another replica starts."""
    up_after_s: float = Field(10.0, ge=0)
    """Time for which the load must be above the target before replicas start, in seconds."""
    down_after_s: float = Field(300.0, ge=0)
    """Time for which the load must be below the target before replicas stop, in seconds."""

    @model_validator(mode="after")
    def _ordered(self) -> Scaling:
        if self.min > self.max:
            raise ValueError(f"min={self.min} is above max={self.max}; lower it")
        return self


def _always(replicas: Any) -> Any:
    return {"min": replicas, "max": replicas} if type(replicas) is int else replicas


Replicas = Annotated[Scaling, BeforeValidator(_always)]
_ONE = Scaling(max=1)


class AdaptiveConfig(Section):
    """Early stopping: conditions under which fewer than `serving.candidates` candidates are sampled; see `training/early_stopping.py`.

    It is off unless `min_gain` or `target_score` is set here or in a request. The prior is the distribution of the scores before
    any score of the instruction is known. `python -m benchmarks.adaptive` fits its mean and standard deviation on train rows.
    """

    min_gain: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Stop if another candidate is expected to raise the best score by less than this, in units of the score; null or 0 never stops."""
    target_score: float | None = Field(None, allow_inf_nan=False)
    """Stop if the best score reaches this value; null never stops."""
    round_size: int = Field(4, ge=1)
    """Candidates of each round after the first round, which has the greedy candidates. A smaller value saves more tokens and takes
    more time."""
    prior_mean: float = 0.25
    """Mean of the prior of the scores."""
    prior_std: float = Field(0.15, gt=0)
    """Standard deviation of the scores of different responses to one instruction, in the prior."""
    prior_weight: float = Field(2.0, gt=0)
    """Weight of the prior: the number of scores of the instruction that count as much as the prior."""


class ServingConfig(Section):
    """The server of `cappy serve`."""

    host: str = "127.0.0.1"
    """Address that the server listens on."""
    port: int = Field(8000, ge=1, le=65535)
    """Port that the server listens on."""
    api_keys: tuple[ApiKeyConfig, ...] = ()
    """The clients. Without any entry, every client that can reach `host` is accepted."""
    cors_origins: tuple[Annotated[str, Field(pattern=r"^(\*|https?://[^/\s*]+)$")], ...] = ()
    """Origins of web pages whose scripts may use the API from a browser, e.g. `https://app.example.org`; `*` is every origin. A server
    without keys cannot have `*`: every page that a user of this machine visits could use the LLM."""
    probes_without_key: bool = False
    """Answer `/ready` without an API key, for the probes of an orchestrator. `/health` and the web page never need a key."""
    allow_no_keys: bool = False
    """Allow a `host` that other machines can reach without API keys, e.g. behind your own gateway."""
    model_name: str = "cappy"
    """Name of the LLM with the main scorer (`scorer_path`), for field `model` of a request."""
    scorer_name: str = "cappy-scorer"
    """Name of the main scorer alone, for the routes that score, rank and classify. These routes accept `model_name` as well."""
    llm_name: str = "cappy-llm"
    """Name of the LLM alone, without a scorer."""
    scorers: tuple[NamedScorer, ...] = ()
    """Further scorers. A scorer is loaded when a request first names it."""
    adapted: bool = False
    """Serve the scorers that `cappy adapt` published in `adapted_path` as well, each under the name of its task."""
    scorers_loaded: int = Field(4, ge=1)
    """Largest number of further scorers in the memory of a replica. The least recently used scorer is removed first."""
    reload_s: float = Field(10.0, gt=0)
    """Interval between checks for a new version of a scorer in use, in seconds. A new version replaces the old one."""
    candidates: int = Field(8, ge=1, le=256)
    """Default number of candidates of a request."""
    max_candidates: int = Field(64, ge=1, le=256)
    """Largest number of candidates of a request."""
    max_pairs: int = Field(1000, ge=1)
    """Largest number of pairs in a request to score, rank or classify."""
    max_pairs_chars: int = Field(4_000_000, ge=1)
    """Largest number of characters in all pairs of a request. A text counts once for each of its pairs, because the scorer reads it
    in each pair."""
    max_prompt_chars: int = Field(200_000, ge=1)
    """Largest number of characters in all messages of a request. A longer request is rejected before it is tokenised."""
    max_sampled_tokens: int = Field(65_536, ge=1)
    """Largest sum over the decodings of a request of candidates times `max_tokens`."""
    max_body_bytes: int = Field(1 << 20, ge=1)
    """Largest size of a request body, in bytes."""
    body_timeout_s: float = Field(10.0, gt=0)
    """Time limit for receiving a request body, in seconds."""
    scorer_context: Literal["last", "conversation"] = "last"
    """Instruction that the scorer reads for a chat: `last` is the last user message alone, as in training. `conversation` is all
    messages as one text, in the form of `sampler.prompt.form=raw`."""
    selection: SelectionMode = "scorer"
    """`scorer` ranks by the fitted selection of the scorer (`selection.json`), and by the score if it has none. `fitted` does the same and
    requests log-probabilities from the start; `scorer` does so only after an answer of the scorer showed that it has a selection.
    `score` selects by the score alone.
    `consensus` selects the candidate that agrees most with the others by the metric of `generate.label`, without a scorer.
    `blend` adds the mean log-probability of the LLM, at the weight that was fitted with the scorer; without a weight or a
    log-probability it selects by the score alone."""
    llm_replicas: Replicas = _ONE
    """Replicas of the LLM: a number, or `{min, max, target, up_after_s, down_after_s}`."""
    scorer_replicas: Replicas = _ONE
    """Replicas of the scorer, as for `llm_replicas`."""
    gateway_replicas: Replicas = _ONE
    """Replicas of the gateway, as for `llm_replicas`. The rate limits and the queue are separate for each replica."""
    llm_gpus: int | None = Field(None, ge=0)
    """GPUs of an LLM replica. null is the number that the engine needs, or 0 if the cluster has no GPU when the server starts."""
    scorer_gpus: float = Field(0.0, ge=0)
    """GPUs reserved for a scorer replica, or a share of one. With 0 it shares a visible GPU with other processes, or uses the CPU."""
    scorer_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the scorers. `auto` is bfloat16 on hardware with native bfloat16 multiplication, else float32. bfloat16 changes
    a score by up to about 0.01."""
    scorer_threads: int = Field(8, ge=1)
    """Compute threads of a scorer replica on CPU, at most the number of cores. Under load each thread computes a separate batch. Few
    threads delay an LLM on the same cores for longer than many threads."""
    max_concurrency: int = Field(32, ge=1)
    """Largest number of concurrent requests of a gateway replica."""
    max_queue: int = Field(20, ge=0)
    """Largest number of queued requests of a gateway replica. Further requests are rejected with status 503. The default is below
    `max_concurrency`, which bounds the latency under overload (docs/results.md, Overload)."""
    timeout_s: float = Field(120.0, gt=0)
    """Time limit of a request, in seconds."""
    scorer_timeout_s: float = Field(30.0, gt=0)
    """Time limit of the scorer, in seconds; after it `fallback` applies."""
    fallback: Fallback = "none"
    """Selection if the scorer fails or times out: `self_score` takes the highest mean log-probability of the LLM, `consensus` the
    candidate that agrees most with the others, `first` the first candidate. `none` rejects the request with status 503."""
    keep_alive_s: float = Field(5.0, gt=0)
    """Interval between keep-alive comments of a streamed answer during sampling and scoring, in seconds."""
    probe_s: float | None = Field(60.0, gt=0)
    """Interval between test requests in seconds. A test request samples two candidates and scores them. It is sent if
    no request succeeded in this time; if it fails, `/ready` reports 503. null disables it. An LLM behind an endpoint, or with
    scale to zero, gets no test requests, because they would cost money or keep it running."""
    probe_timeout_s: float = Field(60.0, gt=0)
    """Time limit of a test request, in seconds."""
    access_log: bool = True
    """Write one line of JSON for each request to the `logs/serve` folder of Ray, without prompts and keys."""
    log_candidates: str | None = None
    """Folder or s3:// prefix for a log of the candidates of chat and text completions, with their instructions and scores. `cappy annotate`
    labels its rows once references or ratings exist. null logs nothing. A request with `store: false` is not logged."""
    adaptive: AdaptiveConfig = AdaptiveConfig()
    """Early stopping of the sampling."""

    @model_validator(mode="after")
    def _within(self) -> ServingConfig:
        if self.candidates > self.max_candidates:
            raise ValueError(f"candidates={self.candidates} is above max_candidates={self.max_candidates}; lower it")
        twice = [key.name for place, key in enumerate(self.api_keys) if key.name in [each.name for each in self.api_keys[:place]]]
        if twice:
            raise ValueError(f"api_keys has the name {twice[0]!r} twice; give each key a different name")
        if self.gateway_replicas.min == 0:
            raise ValueError("gateway_replicas.min=0: no gateway would accept the first request; use at least 1")
        if "*" in self.cors_origins and not self.api_keys:
            raise ValueError("cors_origins=['*'] without api_keys lets every web page use the server; name the origins")
        check_names(self, [scorer.name for scorer in self.scorers])
        return self

    def pair(self, scorer: str) -> str:
        """Return the name of the LLM with a scorer."""
        return self.model_name if scorer == self.scorer_name else f"{self.model_name}+{scorer}"


def check_names(serving: ServingConfig, scorers: Sequence[str]) -> None:
    """Raise `ValueError` if two models of a server have the same name. `scorers` are the names of the further scorers."""
    settings = {"model_name": serving.model_name, "scorer_name": serving.scorer_name, "llm_name": serving.llm_name}
    taken: dict[str, str] = {}
    for setting, name in [
        *settings.items(),
        *(("scorers", name) for name in scorers),
        *(("a pair", serving.pair(name)) for name in scorers),
    ]:
        if name in taken:
            raise ValueError(f"{taken[name]} and {setting} are both {name!r}; give each a different name")
        taken[name] = setting
