"""Every setting of a run as one typed, frozen tree, checked before anything starts.

A config comes from the defaults below, then a YAML file, then `--set section.key=value`, each over the last. Rules across
fields live on the section that holds them. Knows no Ray and no model library, so the command line starts fast.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from cluster.errors import UsageError

CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "configs"

# The eight BIG-bench generation tasks the demo and the defaults use.
DEMO_TASKS = (
    "auto_categorization",
    "codenames",
    "tense",
    "qa_wikidata",
    "disfl_qa",
    "rephrase",
    "linguistic_mappings",
    "mult_data_wrangling",
)


class Section(BaseModel):
    """A part of the tree: immutable, and a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class BigBenchSource(Section):
    """BIG-bench generation tasks, out of the PyPI sdist `bigbench==1.0.0`, rendered zero-shot."""

    kind: Literal["bigbench"] = "bigbench"
    tasks: tuple[str, ...] = Field(DEMO_TASKS, min_length=1)
    """Task names, e.g. `tense`; a task with subtasks takes all of them."""
    train_rows: int | None = Field(None, ge=1)
    """At most this many train instructions a task; all of them when null."""
    validation_rows: int | None = Field(None, ge=1)
    """At most this many validation instructions a task; all of them when null."""
    limit: int | None = Field(None, ge=1)
    """Instructions taken, the first ones; all of them when null."""


class RowsSource(Section):
    """What files and hub datasets have in common: rows of some format, and the split."""

    format: Literal["auto", "cappy", "p3", "promptsource", "natural-instructions", "bigbench", "alpaca", "chat"] = "auto"
    """What the rows look like; `auto` tells by the keys of each row (and `promptsource` by `templates`)."""
    templates: str | None = None
    """A PromptSource `templates.yaml`, local or s3://, applied to raw rows; each of its templates gives a row."""
    dataset: str | None = Field(None, min_length=1)
    """Name of the dataset of all rows; null takes the row's own, else the file's or hub dataset's."""
    limit: int | None = Field(None, ge=1)
    """Instructions taken, the first ones; all of them when null."""
    train_rows: int | None = Field(None, ge=1)
    """At most this many train instructions a dataset; all of them when null."""
    validation_rows: int | None = Field(None, ge=1)
    """At most this many validation instructions a dataset; all of them when null."""
    validation_fraction: float = Field(0.2, ge=0, lt=1)
    """Share of the examples (or datasets) without a `split` that go to validation, by hash."""
    split_by: Literal["example", "dataset"] = "example"
    """`example` keeps the instructions of one underlying example on one side, `dataset` those of a whole dataset."""

    @model_validator(mode="after")
    def _templates_need_raw_rows(self) -> RowsSource:
        if (self.format == "promptsource") != (self.templates is not None) and self.format != "auto":
            raise ValueError(
                f"format={self.format} with templates={self.templates}: a templates.yaml goes with format promptsource (or auto), "
                f"and that format needs one"
            )
        return self


class FilesSource(RowsSource):
    """The user's own files: JSONL, Parquet, CSV (a header row) or JSON, in any of the formats of `format`."""

    kind: Literal["files"] = "files"
    path: str = Field(min_length=1)
    """A file, a glob (`data/*.jsonl`) or a folder, local or s3://."""


class HubSource(RowsSource):
    """A Hugging Face dataset, streamed, without any code of its own."""

    kind: Literal["hub"] = "hub"
    name: str = Field(min_length=1)
    """`owner/name`, or a local folder in hub layout."""
    subset: str | None = None
    """The dataset's configuration, where it has several."""
    split: str = "train"
    """The dataset's split that is read; `validation_fraction` divides it."""
    revision: str | None = Field(None, pattern=r"^[0-9a-f]{40}$")
    """The commit to read, 40 hex digits; needed for a name, not for a local folder."""
    data_dir: str | None = Field(None, min_length=1)
    """Folder of the dataset to read, with a folder for each split; null reads the files that its card or layout names."""

    @model_validator(mode="after")
    def _subset_or_folder(self) -> HubSource:
        if self.subset is not None and self.data_dir is not None:
            raise ValueError(f"subset={self.subset} with data_dir={self.data_dir}: each names the files to read; leave one out")
        return self

    @model_serializer(mode="wrap")
    def _without_default_folder(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave `data_dir` out where it is null: runs begun before the setting existed keep their fingerprint."""
        tree: dict[str, Any] = write(self)
        return {name: value for name, value in tree.items() if name != "data_dir" or value is not None}


PlainSource = Annotated[BigBenchSource | FilesSource | HubSource, Field(discriminator="kind")]


class MixturePart(Section):
    """One source of a mixture."""

    name: str | None = None
    """What the part is called in counts; null takes a name from the source."""
    source: PlainSource
    weight: float | None = Field(None, gt=0)
    """Share of the mixture, in the ratio to the other parts' weights; with policy `weights` only."""


class MixtureSource(Section):
    """Several sources as one."""

    kind: Literal["mixture"] = "mixture"
    parts: tuple[MixturePart, ...] = Field(min_length=1)
    policy: Literal["concatenate", "t0", "weights"] = "concatenate"
    """`concatenate` takes all rows; `t0` caps each dataset at `cap` / number of its templates rows a template, as T0 did;
    `weights` draws rows without replacement so that the parts stand in the ratio of their weights, mixed evenly."""
    cap: int = Field(500_000, ge=1)
    """Instructions a dataset has at most under policy `t0`."""
    rows: int | None = Field(None, ge=1)
    """Instructions drawn under policy `weights`; null, or more than there are, ends when the first part is used up."""

    @model_validator(mode="after")
    def _consistent(self) -> MixtureSource:
        for number, part in enumerate(self.parts):
            if (part.weight is None) == (self.policy == "weights"):
                raise ValueError(f"parts.{number}.weight={part.weight} with policy={self.policy}: weights go with policy weights, one each")
        if self.rows is not None and self.policy != "weights":
            raise ValueError(f"rows={self.rows} goes with policy weights, not {self.policy}; use `limit` of a source")
        return self


Source = Annotated[BigBenchSource | FilesSource | HubSource | MixtureSource, Field(discriminator="kind")]


class DecontaminationConfig(Section):
    """Evaluation rows that train instructions must not overlap with."""

    files: tuple[str, ...] = ()
    """Files, folders or globs of evaluation rows, in any format of `source.format`; none leaves the train rows as they are."""
    n: int = Field(13, ge=2, le=64)
    """Words in a row that count as overlap (lower-cased, alphanumeric); texts with fewer words overlap when all are equal."""


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

    decides: ClassVar = ("kind", "dtype", "max_model_len")
    """The settings the candidates depend on; a run goes on only with the same."""

    @property
    def most_tokens(self) -> int | None:
        """Tokens a candidate may have at most; None where only the server knows."""
        return self.max_model_len - 1


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


class LabelConfig(Section):
    """How a sampled response is labelled against the references."""

    metric: Literal["rouge_l", "token_f1", "chrf", "exact_match"] = "rouge_l"
    mode: Literal["paper", "unicode"] = "paper"
    """What a word is to `rouge_l` and `token_f1`: `paper` knows Latin letters and digits only, `unicode` every script."""

    @model_validator(mode="after")
    def _has_words(self) -> LabelConfig:
        if self.mode != "paper" and self.metric not in ("rouge_l", "token_f1"):
            raise ValueError(f"mode={self.mode} is for rouge_l and token_f1; metric={self.metric} compares no words, leave mode out")
        return self


class GenerateConfig(Section):
    """How `cappy generate` assembles and writes the regression set."""

    label: LabelConfig = LabelConfig()
    mismatched: int = Field(1, ge=0, le=16)
    """References of other instructions of the same dataset added with label 0.0, for each reference."""
    hard_mismatched: int = Field(0, ge=0, le=16)
    """The same, of other instructions of the same dataset and template."""
    max_per_bin: int | None = Field(None, ge=1)
    """Balances the labels: of a train instruction's samples at most this many different ones in each tenth of the label stay in the
    set, drawn by seed; null keeps all. Validation instructions keep theirs, or nothing could be compared on them."""
    unit_rows: int = Field(32, ge=1)
    """Instructions in a unit of work: what one sampling call takes, what is saved at once and never sampled again."""
    shard_mib: int = Field(128, ge=1)
    """Size the published Parquet shards are filled to, in MiB."""
    row_group_rows: int = Field(8192, ge=1)
    """Instructions in a row group of a shard: what a training reader takes at once."""
    max_error_rate: float = Field(0.5, ge=0, le=1)
    """Stop before publishing when more than this share of the rows went to the dead-letter file."""
    metrics_port: int | None = Field(None, ge=1, le=65535)
    """Port where the driver tells Prometheus how far the run is (`/metrics`); null is none."""
    metrics_host: str = "127.0.0.1"
    """Address it listens on; 0.0.0.0 lets other machines look."""
    license: str | None = None
    """Licence of the set for its card, e.g. `apache-2.0`; null says unknown: it is the sources' and the LLM's to decide."""


class PlanConfig(Section):
    """What `cappy plan` takes for granted. It decides nothing about the set."""

    gpus: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 8, 64, 512), min_length=1)
    """Numbers of GPUs to give the wall time for."""
    gpu_dollars_per_hour: float = Field(4.0, ge=0)
    """Price of one GPU hour."""
    rates_from: str | None = None
    """A published set, or a JSON file with `tokens_per_second` (a benchmark's result), whose measured rate is taken; local or s3://."""
    sampled_tokens_per_second: float | None = Field(None, gt=0)
    """Tokens one replica samples in a second; null takes `rates_from`, else a calculation from the LLM's size."""
    prompt_tokens_per_second: float | None = Field(None, gt=0)
    """Prompt tokens one replica reads in a second; null says that the rate above has the reading in it."""
    bytes_per_pair: float | None = Field(None, gt=0)
    """Size of a published pair, in bytes; null takes `rates_from`, else a measured default."""
    sample_rows: int = Field(2000, ge=1)
    """Rows of each dataset whose tokens are counted; the others' bytes are, and their tokens follow from the ratio."""

    @model_validator(mode="after")
    def _together(self) -> PlanConfig:
        if self.prompt_tokens_per_second and not self.sampled_tokens_per_second:
            raise ValueError(
                f"prompt_tokens_per_second={self.prompt_tokens_per_second:g} stands alone; give sampled_tokens_per_second with it"
            )
        return self


class ScorerConfig(Section):
    """The scorer as a model."""

    encoder: str = "minilm-l6"
    """The pretrained encoder the scorer is built on: an embedded name, a hub name, a local folder or an s3:// folder."""
    max_length: int = Field(512, ge=16)
    """Tokens of instruction plus response; the middle of the instruction is cut before the response ever is."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Arithmetic of training and batch scoring; auto is bfloat16 where the hardware has it, else float32."""


class ObjectiveConfig(Section):
    """The loss: a weighted sum of terms, on labels or what is made of them. The default is the paper's: the squared error alone."""

    mse: float = Field(1.0, ge=0)
    """Weight of the mean squared error of the raw logit."""
    pairwise: float = Field(0.0, ge=0)
    """Weight of the logistic loss of score differences within an instruction, each weighted by the gap between the labels."""
    listwise: float = Field(0.0, ge=0)
    """Weight of the cross entropy within an instruction from the softmax of the labels to that of the scores."""
    temperature: float = Field(0.2, gt=0)
    """Scores and labels are divided by it in `pairwise` and `listwise`; a difference far above it counts as decided."""
    labels: Literal["plain", "power", "rank"] = "plain"
    """`power` trains towards label ** `power`, `rank` towards the label's rank within its instruction, from 0 to 1."""
    power: float = Field(0.5, gt=0)
    """Exponent of `labels: power`; below 1 it pulls low labels apart, above 1 high ones."""

    @property
    def grouped(self) -> bool:
        """Whether an instruction's candidates must stand in the same step."""
        return bool(self.pairwise or self.listwise or self.labels == "rank")

    @model_validator(mode="after")
    def _something(self) -> ObjectiveConfig:
        if not (self.mse or self.pairwise or self.listwise):
            raise ValueError("mse, pairwise and listwise are all 0, so nothing would be learned; give one of them a weight")
        return self


class TrainingConfig(Section):
    """How `cappy train` fits the scorer."""

    workers: int = Field(1, ge=1)
    min_workers: int | None = Field(None, ge=1)
    """Go on with fewer workers, down to this many, where machines are lost, and with up to `workers` where they come; null waits
    for all of `workers`."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """`ddp` gives each worker the whole model, `fsdp` a part of weights, gradients and optimizer state: less memory, more traffic."""
    gpus_per_worker: int | None = Field(None, ge=0, le=1)
    """Null takes one where the cluster has GPUs for all workers, else none."""
    epochs: int = Field(4, ge=1)
    batch_size: int = Field(32, ge=1)
    """Pairs per optimizer step, summed over all workers."""
    batch_by: Literal["pairs", "tokens"] = "pairs"
    """What the steps of a window have alike: `pairs` gives each `batch_size` pairs; `tokens` gives as many steps about as many tokens
    each, so that a step of long pairs has fewer of them and takes no longer; every pair weighs the same either way."""
    micro_batch_tokens: int = Field(8192, ge=1)
    """Padded tokens a worker runs through the model at once; the rest of its share of a step is accumulated. Lower it where a GPU runs
    out of memory, raise it where one is idle."""
    learning_rate: float = Field(1e-4, gt=0)
    """Peak of the schedule."""
    schedule: Literal["linear", "cosine"] = "linear"
    """How the learning rate falls to 0 after the warmup, counted in optimizer steps."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of the optimizer steps over which the learning rate rises."""
    weight_decay: float = Field(0.01, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this global norm."""
    objective: ObjectiveConfig = ObjectiveConfig()
    attention_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on attention probabilities; 0 lets attention take its fast kernels."""
    window: int = Field(4096, ge=1)
    """Pairs shuffled and sorted by length together before they are cut into steps."""
    validate_every: int | None = Field(None, ge=1)
    """Optimizer steps between validations; null is once an epoch. The end of the run has one too."""
    best_by: Literal["last", "selection", "mse", "spearman", "pairwise_accuracy", "accuracy"] = "last"
    """The figure by which one of the validated states is published, e.g. `selection`, the mean label of the best-scored sampled
    candidate. `last` publishes the last state: the validation rows have chosen nothing, so `cappy evaluate` may report on them."""
    patience: int | None = Field(None, ge=1)
    """Stop after this many validations in a row without a better one; null trains to the end."""
    blend_rows: int = Field(500, ge=0)
    """Train instructions on which the weight of the LLM's log-probability in the choice is fitted; 0 fits none."""
    checkpoint_every: int = Field(200, ge=1)
    """Optimizer steps between checkpoints."""
    checkpoints_kept: int = Field(2, ge=1)
    max_failures: int = Field(3, ge=0)
    """Worker failures survived by going on from the last checkpoint."""
    tensorboard: str | None = None
    """Local folder below which TensorBoard's event files are written, a subfolder a run; needs the extra `watch`."""
    mlflow: str | None = None
    """MLflow tracking URI where the run is logged in experiment `cappy`; needs the extra `watch`."""

    @model_validator(mode="after")
    def _split_evenly(self) -> TrainingConfig:
        if self.batch_size < self.workers:
            raise ValueError(f"batch_size={self.batch_size} leaves some of workers={self.workers} without a pair; use a multiple")
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers={self.min_workers} is above workers={self.workers}; lower it")
        if self.batch_by == "tokens" and self.objective.grouped:
            raise ValueError("batch_by=tokens would part the candidates that the objective compares; use batch_by=pairs")
        if self.best_by == "last" and self.patience is not None:
            raise ValueError(f"patience={self.patience} needs a figure to get better, and best_by=last names none; set best_by")
        if self.window < self.batch_size:
            raise ValueError(f"window={self.window} is below batch_size={self.batch_size}; use several times the batch size")
        return self


class LoraConfig(Section):
    """Low-rank adapters: small matrices beside frozen linear layers (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0)
    """The adapters' output is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapters' input."""
    targets: tuple[str, ...] | None = Field(None, min_length=1)
    """Names of the linear layers that get adapters, e.g. `[query, value]`; null is every linear layer of the encoder's blocks."""


class AdaptConfig(Section):
    """How `cappy adapt` fits a scorer to each task. What is not here is as `training` says."""

    base: str | None = None
    """The published scorer to start from: a folder, a hub name or an s3:// folder; null starts from `scorer.encoder`."""
    by: Literal["dataset", "all"] = "dataset"
    """What a task is: each dataset of the source, or all of them together."""
    tasks: tuple[str, ...] | None = Field(None, min_length=1)
    """The datasets to adapt to; all of the set's when null."""
    method: Literal["full", "lora"] = "full"
    """`full` trains and publishes all weights, `lora` adapters to a base that all tasks share."""
    lora: LoraConfig = LoraConfig()
    pairs: int = Field(2048, ge=1)
    """Training pairs of an epoch: a task's distinct pairs, repeated or cut to so many. The paper's is 102,400."""
    epochs: int = Field(1, ge=1)
    batch_size: int = Field(32, ge=1)
    """Pairs per optimizer step. The paper's is 128."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak of the schedule; null is the paper's 2e-5, for `lora` 5e-4."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of the optimizer steps over which the learning rate rises; the paper's."""
    gate: bool = True
    """Publish an adapted scorer only where it beats the base on the task's validation rows; else always."""
    metric: Literal["selection", "pairwise_accuracy"] = "selection"
    """What the gate compares: the mean label of the scorer's pick (Rouge-L; accuracy where a row has answer choices), or the
    share of a row's candidates put in the right order."""
    min_gain: float = Field(0.0, ge=0)
    """Points (hundredths) by which the adapted scorer must be better; at 0 any gain will do."""
    gate_fraction: float = Field(0.5, gt=0, le=1)
    """Share of a task's validation rows, by hash, that the gate decides on; the figures are of the others, so that the choice
    does not flatter them. At 1 it decides on all, and the figures are of the same rows."""
    validation_rows: int = Field(1000, ge=1)
    """Validation rows of a task that are scored at most, by hash."""
    concurrency: int | None = Field(None, ge=1)
    """Tasks trained at once; null is as many as fit the machine, or the cluster as it grows."""
    cpus_per_task: int = Field(1, ge=1)
    """CPUs, and torch threads, of a task."""
    gpus_per_task: float | None = Field(None, ge=0, le=1)
    """GPU of a task; tasks share one below 1. Null is one where the cluster has any, else none."""
    max_retries: int = Field(2, ge=0)
    """Times a task is begun again after its process or node was lost."""

    @model_validator(mode="after")
    def _consistent(self) -> AdaptConfig:
        if self.method == "lora" and self.base is None:
            raise ValueError("method=lora needs a base whose weights the tasks share; give adapt.base, a published scorer")
        return self

    def training(self, training: TrainingConfig) -> TrainingConfig:
        """Return the settings of a task's training loop: those of `training` with this section's over them, on one worker."""
        changes = {
            "workers": 1,
            "min_workers": None,
            "parallel": "ddp",
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate or (2e-5 if self.method == "full" else 5e-4),
            "warmup": self.warmup,
            "window": max(training.window, self.batch_size),
        }
        return TrainingConfig.model_validate({**training.model_dump(), **changes})


class EvaluationConfig(Section):
    """What `cappy evaluate` measures and shows."""

    split: Literal["train", "validation"] = "validation"
    resamples: int = Field(2000, ge=100)
    """Bootstrap resamples behind each interval."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    examples: int = Field(24, ge=0)
    """Instructions shown with all their candidates in the report."""
    adapted: bool = False
    """Score a task's rows with the scorer `cappy adapt` published for it, and with `scorer_path` where it published none."""


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
    """When a request's candidates are enough before all of `serving.candidates` are drawn: see `serving/adaptive.py`.

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


class Config(Section):
    """The whole tree. One file describes a run; its verbs find each other's output through `workspace`."""

    workspace: str = Field("runs/default", min_length=1)
    """Folder or s3:// prefix under which every verb writes, each to its own folder."""
    dataset: str | None = None
    """The regression set `generate` writes and the others read; null is `{workspace}/dataset`."""
    scorer_path: str | None = None
    """The scorer `train` writes and the others read; null is `{workspace}/scorer`."""
    adapted_path: str | None = None
    """Where `adapt` writes a scorer for each task; null is `{workspace}/adapted`."""
    evaluation_path: str | None = None
    """Where `evaluate` writes; null is `{workspace}/evaluation`."""
    seed: int = Field(20261121, ge=0, lt=2**31)
    """Behind every draw, together with the row or step it is for."""
    source: Source = BigBenchSource()
    decontaminate: DecontaminationConfig = DecontaminationConfig()
    sampler: SamplerConfig = SamplerConfig()
    generate: GenerateConfig = GenerateConfig()
    plan: PlanConfig = PlanConfig()
    scorer: ScorerConfig = ScorerConfig()
    training: TrainingConfig = TrainingConfig()
    adapt: AdaptConfig = AdaptConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    serving: ServingConfig = ServingConfig()

    @model_validator(mode="after")
    def _one_endpoint(self) -> Config:
        if self.sampler.engine.kind == "endpoint" and self.serving.llm_replicas.max > 1:
            raise ValueError(
                f"serving.llm_replicas={self.serving.llm_replicas.max} would each keep rates of their own to the endpoint; "
                f"use one and raise sampler.engine.concurrency"
            )
        return self

    @property
    def dataset_uri(self) -> str:
        return self.dataset or f"{self.workspace.rstrip('/')}/dataset"

    @property
    def scorer_uri(self) -> str:
        return self.scorer_path or f"{self.workspace.rstrip('/')}/scorer"

    @property
    def adapted_uri(self) -> str:
        return self.adapted_path or f"{self.workspace.rstrip('/')}/adapted"

    @property
    def evaluation_uri(self) -> str:
        return self.evaluation_path or f"{self.workspace.rstrip('/')}/evaluation"

    def to_yaml(self) -> str:
        """The resolved tree as YAML that `load` reads back to an equal tree."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load(source: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Return the config of a YAML file (a path, or a name in `configs/`) with `section.key=value` overrides on top.

    Raises `UsageError` naming the file or the key, its value and what would be right.
    """
    tree: dict[str, Any] = _read_yaml(source) if source else {}
    for override in overrides:
        _set(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UsageError(_explain(error, source)) from None


def fingerprint(*parts: Any) -> str:
    """16 hex digits that change with any value in `parts` (sections, or anything JSON can hold)."""
    plain = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts]
    return hashlib.blake2b(json.dumps(plain, sort_keys=True).encode(), digest_size=8).hexdigest()


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Each leaf that differs between two plain trees, as `path: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        changes = []
        for key in sorted(old.keys() | new.keys()):
            changes += differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        return changes
    return [] if old == new else [f"{path}: {json.dumps(old)} -> {json.dumps(new)}"]


def _read_yaml(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    if not path.exists() and not path.suffix and (CONFIG_FOLDER / f"{source}.yaml").exists():
        path = CONFIG_FOLDER / f"{source}.yaml"
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        names = ", ".join(sorted(file.stem for file in CONFIG_FOLDER.glob("*.yaml")))
        raise UsageError(f"config file {source} does not exist; give a path or one of: {names}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"config file {source} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise UsageError(f"config file {source} is not YAML{where}: {getattr(error, 'problem', error)}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UsageError(f"config file {source} holds a {type(tree).__name__}; it must hold `section: ...` keys")
    return tree


def _set(tree: dict[str, Any], override: str) -> None:
    """Put one `a.b=value` into a plain tree; the value is read as YAML (`3`, `true`, `[a, b]`, `null`)."""
    path, equals, text = override.partition("=")
    if not equals or not path.strip():
        raise UsageError(f"--set {override}: write it as section.key=value, e.g. --set training.epochs=2")
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        value = text
    *parents, leaf = path.strip().split(".")
    node: Any = tree
    for parent in parents:
        node = _child(node, parent, override)
    if isinstance(node, list):
        node[_index(node, leaf, override)] = value
    elif isinstance(node, dict):
        node[leaf] = value
    else:
        raise UsageError(f"--set {override}: {'.'.join(parents)} holds a plain value, so it has no key {leaf!r}")


def _child(node: Any, key: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, key, override)]
    if not isinstance(node, dict):
        raise UsageError(f"--set {override}: the part before {key!r} holds a plain value, so it has no key {key!r}")
    if node.get(key) is None:
        node[key] = {}
    return node[key]


def _index(node: list[Any], key: str, override: str) -> int:
    if not key.isdigit() or int(key) >= len(node):
        raise UsageError(f"--set {override}: {key!r} is not a position in a list of {len(node)} (counted from 0)")
    return int(key)


# Where a key holds one of several sections, pydantic puts the chosen kind into an error's path, after the key.
_KINDS: dict[Any, dict[Any, type[Section]]] = {
    "source": {"bigbench": BigBenchSource, "files": FilesSource, "hub": HubSource, "mixture": MixtureSource},
    "engine": {"vllm": VLLMConfig, "transformers": Seq2SeqConfig, "endpoint": EndpointConfig},
}


def _explain(error: ValidationError, source: str | Path | None) -> str:
    """Turn pydantic's first error into one line: file, key path, value, and what would be right."""
    errors = [each for each in error.errors(include_url=False) if each["type"] != "default_factory_not_called"]
    first = errors[0]
    location = _without_kinds(first["loc"])
    path = ".".join(str(part) for part in location)
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    where = f"{source}: " if source else ""
    if first["type"] == "extra_forbidden":
        known = _known_keys(tuple(first["loc"]))
        close = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
        return f"{where}unknown key {path}; {hint}{more}"
    message = first["msg"].removeprefix("Value error, ")
    if isinstance(first["input"], dict | list) or not path:
        return f"{where}{path or 'config'}: {message}{more}"
    return f"{where}{path}={first['input']!r}: {message}{more}"


def _without_kinds(location: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """The location as the file writes it."""
    return tuple(part for before, part in zip((None, *location), location, strict=False) if part not in _KINDS.get(before, ()))


def _known_keys(location: tuple[str | int, ...]) -> list[str]:
    """The keys the section at `location` (whose last part is the unknown key) does know."""
    model: Any = Config
    for before, part in zip((None, *location), location[:-1], strict=False):
        if isinstance(part, int):
            continue
        if part in _KINDS.get(before, ()):
            model = _KINDS[before][part]
            continue
        annotation = model.model_fields[str(part)].annotation if str(part) in getattr(model, "model_fields", {}) else None
        model = next((each for each in (annotation, *get_args(annotation)) if hasattr(each, "model_fields")), model)
    return sorted(model.model_fields)
