"""The scorer: an encoder that reads (instruction, response) and returns one raw logit, trained towards a label in [0, 1].

Imports torch and transformers; pydantic, Arrow and storage only in functions that need them; no Ray. A saved scorer loads with
plain `AutoModelForSequenceClassification`, and a one-label model saved by plain transformers loads here.

Shapes: B pairs of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jinja2 import TemplateError
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from cluster.cpu import multiplies_bfloat16
from cluster.errors import CappyError, UsageError, first_line
from training import encoder_kernels
from training.batch_plan import batch_by_tokens
from training.encoding import Encoded, encode_pairs, pad

if TYPE_CHECKING:
    from cluster.config import ScorerConfig, TrainingConfig
    from training.selection import Selection

Dtype = Literal["auto", "bfloat16", "float32"]
Format = Literal["auto", "pair", "chat"]
"""See `scorer.format`."""

CHECKPOINTS = "_checkpoints"
"""Folder beside the model files during training. A folder that has it and no manifest is an unfinished scorer."""
SCORER_FILES = (
    r"(adapter_|generation_)?config\.json|(adapter_)?model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json",
    r"tokenizer[^/]*|special_tokens_map\.json|added_tokens\.json|chat_template\.jinja|vocab\.(txt|json)|merges\.txt|(spiece|sentencepiece\.bpe)\.model",
    r"README\.md|config\.yaml|metrics\.jsonl|loss\.svg|calibration\.svg|results\.json|selection\.json",
)
"""Patterns of the files of a scorer or of its adapters beside the manifest, for `artifacts.OwnedFiles`."""

# Padded tokens of one forward pass. More tokens need more memory and are not faster.
_SCORING_TOKENS = {"cpu": 4096, "cuda": 65536}
# Pairs tokenised and sorted together for scoring. It bounds the memory for any number of pairs.
_SCORING_PAIRS = 8192
# Names of the dropout on attention probabilities in the configs of encoder families.
_ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout")
# Names of the other dropouts in the configs of encoder families.
_HIDDEN_DROPOUT = ("hidden_dropout_prob", "embedding_dropout", "mlp_dropout", "pooler_dropout", "classifier_dropout")


def pick_dtype(dtype: Dtype, device: torch.device) -> Literal["bfloat16", "float32"]:
    """Return `dtype`, and for `auto` bfloat16 where the hardware multiplies it natively, else float32."""
    if dtype != "auto":
        return dtype
    native = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else multiplies_bfloat16()
    return "bfloat16" if native else "float32"


def autocast(dtype: Literal["bfloat16", "float32"], device: torch.device) -> AbstractContextManager[Any]:
    """Return the context of a forward pass: bfloat16 products of float32 weights, or plain float32."""
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()


def longest_input(model: nn.Module) -> int:
    """Return the maximum input length of a model in tokens, from its position embeddings or else from its config."""
    table = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    if isinstance(table, nn.Embedding):
        # RoBERTa's first position is its padding id + 1.
        return int(table.num_embeddings) - (0 if table.padding_idx is None else int(table.padding_idx) + 1)
    if getattr(model.config, "position_biased_input", True) is False:
        return 1 << 30  # relative positions, as in DeBERTa, have no limit
    return int(getattr(model.config, "max_position_embeddings", 0)) or 1 << 30


def load_tokenizer(folder: Path, name: str, setting: str) -> Any:
    """Return the tokenizer of a model folder.

    Raises `CappyError` when it does not load or has no fast version. Only a fast tokenizer reports the text of each token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CappyError(
            f"{setting}={name}: no tokenizer can be loaded ({_first_line(error)}); save one in this folder with save_pretrained"
        ) from None
    if not tokenizer.is_fast:
        raise CappyError(f"{setting}={name}: the tokenizer has no fast version; save one with a tokenizer.json in this folder")
    return tokenizer


def new_model(encoder_folder: Path, scorer: ScorerConfig, training: TrainingConfig, seed: int) -> Any:
    """Return a one-logit regression model on the encoder of a folder, in float32. A missing head is drawn from `seed`.

    Raises `CappyError` when transformers cannot put a head on the encoder. Raises `UsageError` when the encoder cannot read
    `scorer.max_length` tokens, has no attention dropout that can be set, or has fewer layers than `training.frozen_layers`.
    """
    try:
        config = AutoConfig.from_pretrained(encoder_folder, num_labels=1, problem_type="regression")
    except (OSError, ValueError, KeyError) as error:
        raise CappyError(
            f"scorer.encoder={scorer.encoder}: not a model that transformers can load ({_first_line(error)}); give an encoder"
        ) from None
    names = [name for name in _ATTENTION_DROPOUT if hasattr(config, name)]
    if not names:
        raise UsageError(
            f"training.attention_dropout={training.attention_dropout}: scorer.encoder={scorer.encoder} ({config.model_type}) has no such "
            f"setting; choose a BERT, RoBERTa, DeBERTa, ModernBERT, Llama or Qwen model"
        )
    for name in names:
        setattr(config, name, training.attention_dropout)
    if training.dropout is not None:
        for name in _HIDDEN_DROPOUT:
            if hasattr(config, name):
                setattr(config, name, training.dropout)
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        try:
            model = AutoModelForSequenceClassification.from_pretrained(
                encoder_folder, config=config, use_safetensors=True, dtype=torch.float32
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise CappyError(
                f"scorer.encoder={scorer.encoder}: no scorer can be built on it ({_first_line(error)}); give a pretrained encoder, "
                f"or a scorer with one label"
            ) from None
    if scorer.max_length > longest_input(model):
        raise UsageError(
            f"scorer.max_length={scorer.max_length} is above the {longest_input(model)} tokens of scorer.encoder={scorer.encoder}; lower it"
        )
    _remove_blend(model.config)  # training changes the weights that its weight was fitted with
    # By default sentence-transformers and vLLM apply a sigmoid to a single label.
    model.config.sentence_transformers = {"activation_fn": "torch.nn.modules.linear.Identity"}
    _freeze_lower_layers(model, training.frozen_layers, scorer.encoder)
    if scorer.cpu_kernels:
        encoder_kernels.compute_first_token_only(model)
    return model


def _freeze_lower_layers(model: Any, count: int, encoder: str) -> None:
    """Freeze the first `count` layers and all weights before them (the embeddings); with 0 nothing.

    Raises `UsageError` when the encoder has fewer layers.
    """
    if not count:
        return
    blocks = [(name, module) for name, module in model.base_model.named_modules() if isinstance(module, nn.ModuleList)]
    name, layers = max(blocks, key=lambda block: len(block[1]), default=("", ()))
    if count > len(layers):
        raise UsageError(f"training.frozen_layers={count} is above the {len(layers)} layers of scorer.encoder={encoder}; lower it")
    names = [name for name, _ in model.base_model.named_parameters()]  # in the order of the forward pass
    highest = f"{name}.{count - 1}."
    last = max(number for number, each in enumerate(names) if each.startswith(highest))
    for each in names[: last + 1]:
        model.base_model.get_parameter(each).requires_grad = False


@dataclass(frozen=True)
class Choice:
    """The best-scored candidate of an instruction."""

    index: int
    """Its position among the candidates; the first of equal scores."""
    response: str
    score: float
    scores: np.ndarray
    """float32 (candidates,): the raw logit of each candidate."""


class Scorer:
    """A trained scorer. Create one with `Scorer.load`."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        max_length: int,
        dtype: Dtype = "float32",
        device: torch.device | None = None,
        format: Format = "auto",
    ) -> None:
        self.device = device or next(model.parameters()).device
        self.model = model.to(self.device).eval()
        self.tokenizer = tokenizer
        self.format = choose_format(format, model, tokenizer)
        set_pad_token(model, tokenizer, chat=self.format == "chat")
        self.max_length = max_length
        """Limit of instruction plus response, in tokens; of the whole chat with the format `chat`."""
        self.dtype = pick_dtype(dtype, self.device)
        self.selection: Selection | None = None
        """The fitted selection of its folder (`training.selection`); None without one."""

    @classmethod
    def load(
        cls,
        name: str,
        dtype: Dtype = "float32",
        device: str | torch.device | None = None,
        setting: str = "scorer_path",
        cpu_kernels: bool = True,
        format: Format = "auto",
    ) -> Scorer:
        """Load a scorer of `cappy train` or `cappy adapt`, or any one-label Hugging Face model. Adapters are merged into their base.

        Public reward models are such models: decoders that read a chat.

        Args:
            name: a folder, a hub name or an s3:// folder.
            dtype: float32 is exact; bfloat16 is faster, with errors of about 0.01 in the score.
            device: None uses the GPU if there is one.
            setting: the setting that error messages name.
            cpu_kernels: False uses the plain modules of transformers, as `scorer.cpu_kernels`.
            format: the form of the input of a model that `cappy` did not train, as `scorer.format`.

        Raises `CappyError` when `name` is not a finished one-label model, cannot score pairs, or has a damaged `selection.json`.
        """
        from cluster import models
        from training import selection

        refuse_unfinished(name)
        folder = models.resolve(name, setting, adapters=True)
        plain = (folder / "config.json").exists()
        model, tokenizer = _load_whole(folder, name, setting) if plain else _load_adapted(folder, name, setting)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if cpu_kernels:
            encoder_kernels.compute_first_token_only(model)
        known = read_format(model.config) or format
        scorer = cls(model, tokenizer, min(tokenizer.model_max_length, longest_input(model)), dtype, device, known)
        if scorer.dtype == "bfloat16":
            # Without training, float32 weights are not needed; casting them at each product takes time.
            scorer.model.to(torch.bfloat16)
        if scorer.device.type == "cpu" and cpu_kernels:
            encoder_kernels.pack_for_cpu(scorer.model)
        scorer._check_scores(f"{setting}={name}")
        scorer.selection = selection.read(str(folder))
        return scorer

    @property
    def logprob_weight(self) -> float | None:
        """The blend's weight of the LLM's mean log-probability, in score per nat (see `training.blend`); None when none was fitted.

        Raises `CappyError` when the model's config has an invalid value.
        """
        ours = getattr(self.model.config, "cappy", None) or {}
        try:
            weight = (ours.get("blend") or {}).get("logprob_weight")
            return None if weight is None else float(weight)
        except (AttributeError, TypeError, ValueError):
            raise CappyError(f"config.json has cappy={ours!r}, which `cappy train` did not write; correct it or remove `cappy`") from None

    def score(self, instructions: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """Return the raw logit of each pair in the given order, float32 (pairs,). Raises `ValueError` when the lists differ in length."""
        return self.score_and_count(instructions, responses)[0]

    def score_and_count(self, instructions: Sequence[str], responses: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the scores, as `score` does, and the tokens of each pair after cutting, int64 (pairs,)."""
        if len(instructions) != len(responses):
            raise ValueError(f"{len(instructions)} instructions and {len(responses)} responses; give one response for each instruction")
        scores, lengths = [np.zeros(0, np.float32)], [np.zeros(0, np.int64)]
        for start in range(0, len(instructions), _SCORING_PAIRS):
            chunk = slice(start, start + _SCORING_PAIRS)
            encoded = self.encode(instructions[chunk], responses[chunk])
            scores.append(self.score_encoded(encoded))
            lengths.append(encoded.lengths)
        return np.concatenate(scores), np.concatenate(lengths)

    def encode(self, instructions: Sequence[str], responses: Sequence[str]) -> Encoded:
        """Return the tokenised pairs, cut to `max_length`, in the format of the scorer."""
        return encode_pairs(self.tokenizer, instructions, responses, self.max_length, chat=self.format == "chat")

    def score_encoded(self, encoded: Encoded) -> np.ndarray:
        """Return the raw logit of each tokenised pair in the given order, float32 (pairs,)."""
        scores = np.zeros(len(encoded), np.float32)
        budget = _SCORING_TOKENS[self.device.type]
        arithmetic = nullcontext() if self.model.dtype == torch.bfloat16 else autocast(self.dtype, self.device)
        with torch.inference_mode(), arithmetic:
            for rows in batch_by_tokens(encoded.lengths, budget):
                inputs = pad(encoded, rows, self.tokenizer.pad_token_id, self.device)
                logits_B1 = self.model(**inputs).logits
                scores[rows] = logits_B1[:, 0].float().cpu().numpy()
        return scores

    def _check_scores(self, described: str) -> None:
        """Raise `CappyError` when the model cannot score two pairs in one batch, one of them empty."""
        try:
            scores = self.score(["Is a fox red?", ""], ["yes", ""])
        except (RuntimeError, ValueError, IndexError, TypeError, TemplateError) as error:
            raise CappyError(f"{described}: the model cannot score a pair ({_first_line(error)}); give a scorer of `cappy train`") from None
        if not np.isfinite(scores).all():
            raise CappyError(f"{described}: the score of a test pair is not a finite number; the weights are damaged, publish them again")

    def best(self, instruction: str, candidates: Sequence[str]) -> Choice:
        """Return the candidate with the highest score. Raises `ValueError` for an empty list."""
        if not candidates:
            raise ValueError("there are no candidates to choose from; give at least one")
        # Each different one once: in a batch, equal rows may differ by roundings.
        distinct = {candidate: position for position, candidate in enumerate(dict.fromkeys(candidates))}
        scores = self.score([instruction] * len(distinct), list(distinct))[[distinct[candidate] for candidate in candidates]]
        index = int(scores.argmax())
        return Choice(index, candidates[index], float(scores[index]), scores)

    def best_of(self, outputs: Sequence[Any], instructions: Sequence[str] | None = None) -> list[Choice]:
        """Return the best completion of each output of `vllm.LLM.generate` or `vllm.LLM.chat`, sampled with `n` above 1.

        The fitted selection of the scorer ranks the completions if it has one, as in `cappy serve`; otherwise the score decides. Sample
        with `logprobs=0`, so that the selection can use the log-probabilities.

        Args:
            outputs: a list of `vllm.RequestOutput`.
            instructions: the instruction of each output, as the scorer reads it; None takes the prompts. Give them if the prompts have a
                chat template or few-shot examples.

        Raises `ValueError` for an output without completion or prompt text, and if `instructions` has another length.

        Example: `[each.response for each in scorer.best_of(llm.generate(prompts, SamplingParams(n=8, logprobs=0)))]`
        """
        from training.vllm_outputs import rank_outputs

        choices = []
        for responses, scores, values in rank_outputs(outputs, instructions, self.score, self.selection):
            index = int(values.argmax())
            choices.append(Choice(index, responses[index], float(scores[index]), scores))
        return choices

    def save(self, folder: str | Path) -> None:
        """Write model and tokenizer into a folder, for `from_pretrained` of `AutoModelForSequenceClassification` and `AutoTokenizer`."""
        self.tokenizer.model_max_length = self.max_length
        with quiet():
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)


def read_format(config: Any) -> Literal["pair", "chat"] | None:
    """Return the format that a scorer of `cappy` was trained with, from the config of its model; None for other models."""
    if not hasattr(config, "cappy"):
        return None
    return "chat" if (config.cappy or {}).get("format") == "chat" else "pair"


def choose_format(wanted: Format, model: Any, tokenizer: Any) -> Literal["pair", "chat"]:
    """Return the format of a model's input, and keep it in the model's config if the tokenizer has a chat template.

    Raises `UsageError` for `chat` without a chat template.
    """
    chosen = wanted
    template = getattr(tokenizer, "chat_template", None)
    if chosen == "auto":
        chosen = read_format(model.config) or ("chat" if template and not _is_encoder(model.config) else "pair")
    if chosen == "chat" and not template:
        raise UsageError("scorer.format=chat: the tokenizer has no chat template; use pair, or save a chat_template.jinja in its folder")
    if template:
        model.config.cappy = {**(getattr(model.config, "cappy", None) or {}), "format": chosen}
    return chosen


def _remove_blend(config: Any) -> None:
    """Remove the weight of a blend from the config of a model, and keep its format."""
    if hasattr(config, "cappy"):
        config.cappy = {"format": config.cappy["format"]} if (config.cappy or {}).get("format") else None


def _is_encoder(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def set_pad_token(model: Any, tokenizer: Any, *, chat: bool = False) -> None:
    """Make the model and its tokenizer use the same pad token; decoders often lack one.

    A decoder reads its score at the last token that is not the pad token. So a new pad token must not occur in pairs. The config must
    have the tokenizer's pad token, because otherwise a score would depend on the other pairs of its batch.

    Raises `CappyError` when the tokenizer has no special token that can serve.
    """
    if tokenizer.pad_token_id is None:
        used = encode_pairs(tokenizer, ["a"], ["b"], tokenizer.model_max_length, chat=chat).tokens.tolist()
        free = [token for token in ("eos_token", "unk_token") if getattr(tokenizer, f"{token}_id") not in (None, *used)]
        if not free:
            raise CappyError("the tokenizer of the scorer has no pad token; set `pad_token` in its tokenizer_config.json")
        tokenizer.pad_token = getattr(tokenizer, free[0])
    is_encoder = _is_encoder(model.config)
    for config in (model.config, model.config.get_text_config()):
        if config.pad_token_id is None or not is_encoder:
            config.pad_token_id = tokenizer.pad_token_id


def _load_whole(folder: Path, name: str, setting: str) -> tuple[Any, Any]:
    """Return the model, in float32, and the tokenizer of a folder that has both."""
    tokenizer = load_tokenizer(folder, name, setting)
    with quiet():
        try:
            model, report = AutoModelForSequenceClassification.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise CappyError(
                f"{setting}={name}: not a model that can score ({_first_line(error)}); give a scorer of `cappy train`"
            ) from None
    if model.config.num_labels != 1:
        labels = model.config.num_labels
        raise CappyError(f"{setting}={name}: the model has {labels} labels, a scorer has one; give a scorer of `cappy train`")
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise CappyError(f"{setting}={name}: the weights lack {missing}, so it has no trained head; run `cappy train` on it first")
    return model, tokenizer


def _load_adapted(folder: Path, name: str, setting: str) -> tuple[Any, Any]:
    """Return the base of some adapters with the adapters merged, and its tokenizer.

    Raises `CappyError` when the base has other weights than the adapters were trained on.
    """
    from cluster import models
    from training import lora

    recorded = lora.read_base(folder)
    base = models.resolve(recorded["uri"], f"base of {setting}={name}")
    if recorded.get("sha256", "") not in ("", lora.weights_sha256(base)):
        raise CappyError(f"{setting}={name}: the weights of its base {recorded['uri']} have changed since; run `cappy adapt` again")
    refuse_unfinished(recorded["uri"])
    model, tokenizer = _load_whole(base, recorded["uri"], f"base of {setting}={name}")
    _remove_blend(model.config)  # its weight was fitted with the base, without the adapters
    return lora.merge_adapters(model, folder, f"{setting}={name}"), tokenizer


def refuse_unfinished(name: str) -> None:
    """Raise `CappyError` when `name` is a folder of `cappy train` or `cappy adapt` without a finished scorer.

    Other model folders and hub names pass.
    """
    from cluster import artifacts, storage

    if not storage.is_s3(name) and not Path(name).expanduser().is_dir():
        return
    if storage.exists(storage.join(name, artifacts.MANIFEST)) or storage.exists(storage.join(name, CHECKPOINTS)):
        artifacts.read_manifest(name, "scorer", "train")


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the progress bars and reports that transformers prints when it loads a model."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return first_line(error)[:200]
