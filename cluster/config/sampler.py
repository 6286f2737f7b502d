"""Settings of `sampler`: the LLM, its prompt, its engine and the decodings. Imports no engine."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from cluster.config.base import ExtendedSection, Section

# Arguments of `apply_chat_template` that are not variables of a template.
_TEMPLATE_ARGUMENTS = frozenset(
    (
        *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message"),
        *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
        "tokenizer_kwargs",
    )
)


class PromptConfig(ExtendedSection):
    """The prompt of the LLM. The scorer always reads the instruction alone."""

    added: ClassVar = ("chat_template_kwargs",)

    form: Literal["chat", "raw"] = "chat"
    """`chat` applies the model's chat template; `raw` continues plain text."""
    system: str | None = None
    """System text: the system turn of the template, or the first paragraph of a raw prompt."""
    shots: int = Field(0, ge=0, le=32)
    """Number of worked examples before the instruction, from train rows of the same template, or else of the same dataset."""
    shots_by: Literal["seed", "similarity"] = "seed"
    """`seed` draws the examples once for all rows of a template, so that the prefix cache can be used; `similarity` takes the most
    similar examples of each row."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables of the chat template, for example `{enable_thinking: false}`. An endpoint gets them in each request."""

    @field_validator("chat_template_kwargs")
    @classmethod
    def _only_variables(cls, variables: dict[str, Any]) -> dict[str, Any]:
        taken = sorted(_TEMPLATE_ARGUMENTS & variables.keys())
        if taken:
            raise ValueError(f"{', '.join(taken)} is not a variable of the template, because Cappy sets it; leave it out")
        return variables


class DecodingConfig(Section):
    """One set of sampling parameters. The candidate pool of an instruction is the union over all decodings."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """Name of the decoding, in column `decoding` of its candidates."""
    n: int = Field(1, ge=1, le=256)
    """Candidates drawn for each instruction."""
    temperature: float = Field(1.0, ge=0, le=4)
    """0 is greedy decoding, or beam search if `beams` is above 1."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the smallest set of most likely tokens with this total probability; 1 samples from all tokens."""
    top_k: int | None = Field(None, ge=1)
    """Sample from this many most likely tokens; null samples from all tokens."""
    beams: int = Field(1, ge=1, le=64)
    """Width of a beam search; its best `n` results are the candidates. Only `engine.kind: transformers` supports it."""
    min_tokens: int = Field(0, ge=0)
    """Smallest length of a candidate, in tokens. Before it, neither the end of text nor a stop string ends the candidate."""
    max_tokens: int = Field(64, ge=1)
    """Largest length of a candidate, in tokens."""
    stop: tuple[str, ...] = ()
    """Strings that end a candidate; the candidate does not include them."""

    @model_validator(mode="after")
    def _consistent(self) -> DecodingConfig:
        if self.beams > 1 and (self.temperature > 0 or self.n > self.beams):
            raise ValueError(
                f"beams={self.beams} with temperature={self.temperature:g} and n={self.n}: use temperature=0 and at most n={self.beams}"
            )
        if self.beams == 1 and self.temperature == 0 and self.n > 1:
            raise ValueError(f"n={self.n} with temperature=0 draws the same candidate {self.n} times; use n=1 or a higher temperature")
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}; lower it")
        return self


GREEDY = DecodingConfig(name="greedy", n=1, temperature=0.0)
# The paper's 17 candidates (section 4.1): one of a beam search, four each of three ways to sample and of plain sampling.
PAPER_DECODINGS = (
    DecodingConfig(name="beam", n=1, temperature=0.0, beams=4, min_tokens=3),
    DecodingConfig(name="sample", n=4, min_tokens=3),
    DecodingConfig(name="temperature", n=4, temperature=0.9, min_tokens=3),
    DecodingConfig(name="top-k", n=4, top_k=40, min_tokens=3),
    DecodingConfig(name="top-p", n=4, top_p=0.95, min_tokens=3),
)
_DEFAULT_DECODINGS = {
    "transformers": PAPER_DECODINGS,
    # The vLLM engine has no beam search; greedy decoding replaces it.
    "vllm": (GREEDY.model_copy(update={"min_tokens": 3}), *PAPER_DECODINGS[1:]),
    # The OpenAI protocol has neither beams, top_k nor min_tokens. A config can set them for a server that accepts them.
    "endpoint": tuple(each.model_copy(update={"min_tokens": 0}) for each in (GREEDY, *PAPER_DECODINGS[1:]) if each.top_k is None),
}


RequestOption = Literal[
    "n", "logprobs", "seed", "max_tokens", "chat_template_kwargs", "min_tokens", "top_k", "stop", "top_p", "temperature"
]
"""The parameters that a request to an endpoint can lack, in the order in which a refusal is compared with them."""


class VLLMConfig(ExtendedSection):
    """A vLLM engine in each sampling or serving replica, for decoder-only models."""

    added: ClassVar = ("share_prefill",)

    kind: Literal["vllm"] = "vllm"
    """Selects the vLLM engine."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Data type of weights and activations; `auto` takes the type in the config of the model. On a CPU that does not multiply bfloat16
    natively, `auto` is float32, which is faster there."""
    max_model_len: int = Field(2048, ge=64)
    """Largest length of prompt plus candidate, in tokens."""
    max_num_seqs: int = Field(64, ge=1)
    """Largest number of candidates that the engine decodes at a time."""
    tensor_parallel: int = Field(1, ge=1)
    """GPUs of one replica."""
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    """Share of the GPU memory that vLLM uses for weights, activations and the KV cache."""
    cpu_kv_cache_gib: float = Field(1.0, gt=0)
    """Size of the KV cache of a replica on a machine without a GPU, in GiB."""
    cpu_threads: int | None = Field(None, ge=1)
    """Compute threads of a replica on a machine without a GPU, at most the number of cores; null is all cores. If other processes
    use the cores too, several replicas with few threads have a higher throughput than one replica with many threads."""
    compile: bool | None = None
    """Use CUDA graphs and torch.compile. null means yes on GPU and no on CPU. On CPU the start then takes up to a minute longer, for
    about 10 % more tokens per second."""
    share_prefill: bool | None = None
    """Prefill the end of a prompt once for all its candidates (CPU only, `tensor_parallel` 1). The default
    (null) does so with vLLM versions that it was tested with. With `true` it is used with every version, with `false` never.
    The candidates are the same in all cases."""

    decides: ClassVar = ("kind", "dtype", "max_model_len")
    """The settings that change the candidates. A run can be resumed only with the same values."""

    @property
    def most_tokens(self) -> int | None:
        """Return the largest possible length of a candidate in tokens, or None if only the server has a limit."""
        return self.max_model_len - 1

    @model_validator(mode="after")
    def _share_prefill_in_one_process(self) -> VLLMConfig:
        if self.share_prefill and self.tensor_parallel > 1:
            raise ValueError(f"share_prefill=true with tensor_parallel={self.tensor_parallel}: use tensor_parallel=1 or share_prefill=null")
        return self


class Seq2SeqConfig(Section):
    """A transformers encoder-decoder in each sampling replica, e.g. T5, FLAN-T5, T0 or BART0."""

    kind: Literal["transformers"]
    """Selects the transformers engine."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Data type of the weights; `auto` is bfloat16 on a GPU and on a CPU with native bfloat16 multiplication, else float32."""
    max_prompt_tokens: int = Field(512, ge=16)
    """Largest length of a prompt, in tokens; a longer prompt goes to the dead letters. The paper has 512; BART has 1024 positions."""
    batch_tokens: int = Field(8192, ge=1)
    """Size of a batch: the tokens of its longest prompt times the number of its candidates of one decoding."""

    decides: ClassVar = ("kind", "dtype", "max_prompt_tokens")

    @property
    def most_tokens(self) -> int | None:
        # A decoder has the positions of its encoder.
        return self.max_prompt_tokens - 1


class EndpointConfig(ExtendedSection):
    """A server with the OpenAI protocol. The key is read from the environment of the sampler."""

    added: ClassVar = ("max_pauses", "max_retry_after_s", "omit")

    kind: Literal["endpoint"]
    """Selects an endpoint."""
    base_url: str
    """Address of the server, up to and including `/v1`; `sampler.model` is the name of the model there."""
    api_key_env: str | None = None
    """Name of the environment variable with the key; null sends no key. Never put the key itself into a config."""
    concurrency: int = Field(16, ge=1)
    """Largest number of concurrent requests."""
    requests_per_minute: float | None = Field(None, gt=0)
    """Rate limit of the requests; null means unlimited."""
    tokens_per_minute: float | None = Field(None, gt=0)
    """Rate limit of prompt and sampled tokens together; null means unlimited."""
    timeout_s: float = Field(120.0, gt=0)
    """Time limit of a request, in seconds; after it the request is sent again."""
    tries: int = Field(6, ge=1)
    """Attempts for a request before its row goes to the dead-letter file. An answer with `Retry-After` counts too, unless the server
    answered another request in the meantime."""
    max_pauses: int = Field(50, ge=1)
    """Answers with `Retry-After` to one request before its row goes to the dead-letter file."""
    max_retry_after_s: float = Field(300.0, ge=1)
    """Longest `Retry-After` that a run waits for, in seconds. After a longer one it retries with short back-off, and stops if the server
    answers no request; the same command resumes it."""
    omit: tuple[RequestOption, ...] = ()
    """Parameters that no request has, because the server rejects them, e.g. `[temperature, logprobs]`. Without `stop`, the candidates
    are cut here. Instead of `max_tokens`, requests have `max_completion_tokens`. Parameters that a server names in a refusal are left
    out without this setting."""
    logprobs: bool = True
    """Request log-probabilities. They are null if the server has none."""
    price_per_million_prompt: float | None = Field(None, ge=0)
    """Dollars per million prompt tokens."""
    price_per_million_sampled: float | None = Field(None, ge=0)
    """Dollars per million sampled tokens."""
    max_cost: float | None = Field(None, gt=0)
    """Budget of the whole run with all its interrupted parts, in dollars; for `serve`, of all servers of a workspace. The run stops
    before it can exceed the budget. A higher budget resumes it."""

    decides: ClassVar = ("kind", "base_url", "logprobs", "omit")

    @property
    def most_tokens(self) -> int | None:
        return None

    @property
    def priced(self) -> bool:
        """Return whether the cost of a request is known."""
        return self.price_per_million_prompt is not None

    @model_validator(mode="after")
    def _usable(self) -> EndpointConfig:
        # A user may put the key itself here by mistake. These messages leave the value out, so that they do not print the key.
        if self.api_key_env is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", self.api_key_env):
            raise ValueError("api_key_env is not the name of an environment variable (capitals, digits, _); give the name, never the key")
        if not re.fullmatch(r"https?://[^@?#\s]+", self.base_url):
            raise ValueError(
                "base_url is not an http:// or https:// address without user, query and fragment; give e.g. https://api.openai.com/v1"
            )
        prices = (self.price_per_million_prompt, self.price_per_million_sampled)
        if None in prices and (self.max_cost is not None or prices != (None, None)):
            raise ValueError("max_cost and prices need both price_per_million_prompt and price_per_million_sampled")
        return self


def _vllm_unless_named(engine: Any) -> Any:
    return {"kind": "vllm", **engine} if isinstance(engine, dict) else engine


EngineConfig = Annotated[VLLMConfig | Seq2SeqConfig | EndpointConfig, Field(discriminator="kind"), BeforeValidator(_vllm_unless_named)]


def _default_decodings(data: dict[str, Any]) -> tuple[DecodingConfig, ...]:
    engine = data.get("engine")  # absent if it is invalid itself
    return _DEFAULT_DECODINGS[engine.kind if engine else "vllm"]


class SamplerConfig(ExtendedSection):
    """The LLM, its prompt, its engine and its decodings."""

    added: ClassVar = ("reasoning", "max_empty_share", "max_tokens_from")

    model: str = "smollm2-135m-instruct"
    """The LLM: an embedded name, a hub name, a local folder or an s3:// folder. A hub name can be pinned to a commit, tag or branch:
    `name@revision`. For an endpoint, the name of the model there."""
    prompt: PromptConfig = PromptConfig()
    """The prompt of the LLM."""
    engine: EngineConfig = VLLMConfig()
    """The engine: vLLM, transformers or an endpoint."""
    decodings: tuple[DecodingConfig, ...] = Field(default_factory=_default_decodings, min_length=1)
    """The decodings. The default is the 17 candidates of the paper, without decodings that the engine does not support."""
    max_tokens_from: Literal["decodings", "references"] = "decodings"
    """Largest length of a candidate. `decodings` takes `max_tokens` of its decoding. `references` lowers it to the length of the
    references, for each dataset of `generate`. That length is the 95th percentile of the bytes of the longest reference of sampled train
    rows, divided by 3, plus 8 tokens."""
    replicas: int = Field(1, ge=1)
    """Number of sampling actors, each with one engine."""
    max_attempts: int = Field(3, ge=1)
    """Attempts for a row before it goes to the dead-letter file. After as many engine crashes during a unit, its rows are sampled one by
    one. A row that then crashes two engines goes to the dead-letter file."""
    reasoning: Literal["strip", "keep"] = "strip"
    """`strip` removes reasoning that the model writes into its response, for example `<think>...</think>`. `keep` leaves it in the
    response, so that it is labelled and scored too."""
    max_empty_share: float = Field(0.5, ge=0, le=1)
    """Largest share of sampled responses without text. Above it the run ends with an error and publishes nothing."""

    @field_validator("decodings")
    @classmethod
    def _distinct(cls, decodings: tuple[DecodingConfig, ...]) -> tuple[DecodingConfig, ...]:
        names = [decoding.name for decoding in decodings]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"decoding names must differ; {twice} occur more than once; rename them")
        return decodings

    @model_validator(mode="after")
    def _fits(self) -> SamplerConfig:
        for decoding in self.decodings:
            if decoding.beams > 1 and self.engine.kind != "transformers":
                raise ValueError(
                    f"decoding {decoding.name!r} has beams={decoding.beams}, which engine.kind={self.engine.kind} does not support; "
                    f"use beams=1 (greedy) or engine.kind=transformers"
                )
            if self.engine.kind == "vllm" and decoding.max_tokens >= self.engine.max_model_len:
                raise ValueError(
                    f"decoding {decoding.name!r} has max_tokens={decoding.max_tokens}, which leaves no room for a prompt in "
                    f"engine.max_model_len={self.engine.max_model_len}"
                )
        if self.engine.kind == "endpoint" and self.replicas > 1:
            raise ValueError(f"replicas={self.replicas} would each have separate rate limits; use 1 and raise engine.concurrency")
        return self

    def result_settings(self) -> dict[str, Any]:
        """Return the settings that decide the candidates. A run can be resumed only with the same values."""
        tree = self.model_dump(mode="json")
        engine = {name: tree["engine"][name] for name in self.engine.decides if name in tree["engine"]}
        # Runs from before this rule have no `logprobs` in their record.
        if engine.get("logprobs"):
            del engine["logprobs"]
        return {name: tree[name] for name in ("model", "prompt", "decodings", "max_tokens_from", "reasoning") if name in tree} | {
            "engine": engine
        }
