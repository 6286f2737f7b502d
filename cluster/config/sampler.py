"""Settings of `sampler`: the LLM, its prompt, its engine and the decodings."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from cluster.config.base import Section


class PromptConfig(Section):
    """How an instruction becomes the LLM's prompt. The scorer always reads the bare instruction."""

    form: Literal["chat", "raw"] = "chat"
    """`chat` applies the model's chat template; `raw` continues plain text."""
    system: str | None = None
    """System text: the template's system turn, or the first paragraph of a raw prompt."""
    shots: int = Field(0, ge=0, le=32)
    """Worked examples put before the instruction, from the train rows of the same template, or dataset."""
    shots_by: Literal["seed", "similarity"] = "seed"
    """`seed` draws them once for all rows of a template, which the prefix cache likes; `similarity` takes the most similar ones."""


class DecodingConfig(Section):
    """One named way to sample; the candidate pool of an instruction is the union over all decodings."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    n: int = Field(1, ge=1, le=256)
    """Candidates drawn for each instruction."""
    temperature: float = Field(1.0, ge=0, le=4)
    """0 is greedy, or beam search where `beams` says so."""
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    """Keep the k likeliest tokens; all of them when null."""
    beams: int = Field(1, ge=1, le=64)
    """Width of a beam search; its best `n` are the candidates. Only `engine.kind: transformers` has one."""
    min_tokens: int = Field(0, ge=0)
    """Tokens before which neither the end of text nor a stop string ends a candidate."""
    max_tokens: int = Field(64, ge=1)
    """Tokens a candidate may have."""
    stop: tuple[str, ...] = ()
    """Strings that end a candidate (not included in it)."""

    @model_validator(mode="after")
    def _consistent(self) -> DecodingConfig:
        if self.beams > 1 and (self.temperature > 0 or self.n > self.beams):
            raise ValueError(
                f"beams={self.beams} needs temperature=0 and at most n={self.beams}; it has {self.temperature:g} and n={self.n}"
            )
        if self.beams == 1 and self.temperature == 0 and self.n > 1:
            raise ValueError(f"n={self.n} with temperature=0 draws the same candidate {self.n} times; use n=1 or raise it")
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}")
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
    # vLLM has no beam search in its engine, so greedy stands in its place.
    "vllm": (GREEDY.model_copy(update={"min_tokens": 3}), *PAPER_DECODINGS[1:]),
    # The OpenAI protocol knows neither beams, top_k nor min_tokens; servers that do take them from a config of one's own.
    "endpoint": tuple(each.model_copy(update={"min_tokens": 0}) for each in (GREEDY, *PAPER_DECODINGS[1:]) if each.top_k is None),
}


class VLLMConfig(Section):
    """A vLLM engine in each sampling or serving replica: decoder-only models."""

    kind: Literal["vllm"] = "vllm"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    max_model_len: int = Field(2048, ge=64)
    """Prompt plus candidate, in tokens."""
    max_num_seqs: int = Field(64, ge=1)
    """Candidates the engine decodes at once."""
    tensor_parallel: int = Field(1, ge=1)
    """GPUs one replica spans."""
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    cpu_kv_cache_gib: float = Field(1.0, gt=0)
    """KV cache of a replica on a machine without a GPU, in GiB."""
    cpu_threads: int | None = Field(None, ge=1)
    """Threads a replica computes with on a machine without a GPU, as far as it has cores; null is all of them. Where other processes
    want the cores too, several replicas of few threads give more answers than one of many, whose threads wait for each other."""
    compile: bool | None = None
    """CUDA graphs and torch.compile; null means yes on GPU, no on CPU, where it takes up to a minute to start and gives a tenth more
    tokens."""
    share_prefill: bool | None = None
    """Prefill the end of a prompt once for all its candidates (CPU only, `tensor_parallel` 1). null turns it on if the installed vLLM
    version is tested with it; true also uses it with other versions; false turns it off. Candidates are the same in all cases."""

    decides: ClassVar = ("kind", "dtype", "max_model_len")
    """The settings the candidates depend on; a run goes on only with the same."""

    @property
    def most_tokens(self) -> int | None:
        """Tokens a candidate may have at most; None where only the server knows."""
        return self.max_model_len - 1

    @model_validator(mode="after")
    def _share_prefill_in_one_process(self) -> VLLMConfig:
        if self.share_prefill and self.tensor_parallel > 1:
            raise ValueError(f"share_prefill=true with tensor_parallel={self.tensor_parallel}: use tensor_parallel=1 or share_prefill=null")
        return self

    @model_serializer(mode="wrap")
    def _without_default_share_prefill(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave `share_prefill` out if it is null: runs from before this setting keep their fingerprint."""
        tree: dict[str, Any] = write(self)
        return {name: value for name, value in tree.items() if name != "share_prefill" or value is not None}


class Seq2SeqConfig(Section):
    """A transformers encoder-decoder in each sampling replica: T5, FLAN-T5, T0, BART0."""

    kind: Literal["transformers"]
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """auto is bfloat16 on a GPU and on a CPU that multiplies it natively, else float32."""
    max_prompt_tokens: int = Field(512, ge=16)
    """Tokens of a prompt; a longer one is a dead letter. The paper's is 512; BART has no more than 1024 positions."""
    batch_tokens: int = Field(8192, ge=1)
    """Size of a batch: its longest prompt, in tokens, times its candidates of one decoding."""

    decides: ClassVar = ("kind", "dtype", "max_prompt_tokens")

    @property
    def most_tokens(self) -> int | None:
        # A decoder has the positions of its encoder.
        return self.max_prompt_tokens - 1


class EndpointConfig(Section):
    """Any server that speaks the OpenAI protocol. The key is read from the environment where the sampler runs."""

    kind: Literal["endpoint"]
    base_url: str
    """The server's address up to and with `/v1`; `sampler.model` is the model's name there."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key; null sends none. The key itself never stands in a config."""
    concurrency: int = Field(16, ge=1)
    """Requests under way at once."""
    requests_per_minute: float | None = Field(None, gt=0)
    tokens_per_minute: float | None = Field(None, gt=0)
    """Prompt and sampled tokens together."""
    timeout_s: float = Field(120.0, gt=0)
    """Seconds until an unanswered request is given up and sent again."""
    tries: int = Field(6, ge=1)
    """Times a request is sent before its row goes to the dead-letter file."""
    logprobs: bool = True
    """Ask for log-probabilities; where the server has none they are null either way."""
    price_per_million_prompt: float | None = Field(None, ge=0)
    """Dollars per million prompt tokens."""
    price_per_million_sampled: float | None = Field(None, ge=0)
    """Dollars per million sampled tokens."""
    max_cost: float | None = Field(None, gt=0)
    """Dollars the whole run (of `serve`: all servers of a workspace) may cost, interrupted parts included; it stops before it could
    pass them, and can go on."""

    decides: ClassVar = ("kind", "base_url")

    @property
    def most_tokens(self) -> int | None:
        return None

    @property
    def priced(self) -> bool:
        """Whether a request's cost is known."""
        return self.price_per_million_prompt is not None

    @model_validator(mode="after")
    def _usable(self) -> EndpointConfig:
        # Whoever puts the key itself here must not read it again in an error, so these messages leave the value out.
        if self.api_key_env is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", self.api_key_env):
            raise ValueError("api_key_env holds no name of an environment variable (capitals, digits, _); give the name, never the key")
        if not re.fullmatch(r"https?://[^@?#\s]+", self.base_url):
            raise ValueError("base_url is no http:// or https:// address without user, query and fragment; e.g. https://api.openai.com/v1")
        prices = (self.price_per_million_prompt, self.price_per_million_sampled)
        if None in prices and (self.max_cost is not None or prices != (None, None)):
            raise ValueError("max_cost and prices need both price_per_million_prompt and price_per_million_sampled")
        return self


def _vllm_unless_named(engine: Any) -> Any:
    return {"kind": "vllm", **engine} if isinstance(engine, dict) else engine


EngineConfig = Annotated[VLLMConfig | Seq2SeqConfig | EndpointConfig, Field(discriminator="kind"), BeforeValidator(_vllm_unless_named)]


def _default_decodings(data: dict[str, Any]) -> tuple[DecodingConfig, ...]:
    engine = data.get("engine")  # absent when it is itself wrong
    return _DEFAULT_DECODINGS[engine.kind if engine else "vllm"]


class SamplerConfig(Section):
    """The LLM, its prompt and how candidates are drawn from it."""

    model: str = "smollm2-135m-instruct"
    """An embedded name, a hub name, a local folder or an s3:// folder; for an endpoint the model's name there."""
    prompt: PromptConfig = PromptConfig()
    engine: EngineConfig = VLLMConfig()
    decodings: tuple[DecodingConfig, ...] = Field(default_factory=_default_decodings, min_length=1)
    """The paper's 17 candidates by default, as far as the engine can draw them."""
    replicas: int = Field(1, ge=1)
    """Sampling actors; each holds one engine."""
    max_attempts: int = Field(3, ge=1)
    """Times a row is tried before it goes to the dead-letter file."""

    @field_validator("decodings")
    @classmethod
    def _distinct(cls, decodings: tuple[DecodingConfig, ...]) -> tuple[DecodingConfig, ...]:
        names = [decoding.name for decoding in decodings]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"decoding names must differ; {twice} stand more than once")
        return decodings

    @model_validator(mode="after")
    def _fits(self) -> SamplerConfig:
        for decoding in self.decodings:
            if decoding.beams > 1 and self.engine.kind != "transformers":
                raise ValueError(
                    f"decoding {decoding.name!r} has beams={decoding.beams}, which engine.kind={self.engine.kind} cannot do; "
                    f"use beams=1 (greedy) or engine.kind=transformers"
                )
            if self.engine.kind == "vllm" and decoding.max_tokens >= self.engine.max_model_len:
                raise ValueError(
                    f"decoding {decoding.name!r} has max_tokens={decoding.max_tokens}, which leaves no room for a prompt in "
                    f"engine.max_model_len={self.engine.max_model_len}"
                )
        if self.engine.kind == "endpoint" and self.replicas > 1:
            raise ValueError(f"replicas={self.replicas} would each keep its own rates; use one and raise engine.concurrency")
        return self
