"""The scorer: a small encoder that reads (instruction, response) and gives one raw logit, trained towards a label in [0, 1].

Torch and transformers only, no Ray; pydantic, Arrow and the store are imported where they are used, if ever. What is saved
here loads with plain `AutoModelForSequenceClassification`, and what plain transformers saved loads here. Shapes: B pairs in a
batch, T tokens of the longest of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from cluster.errors import CappyError, UsageError
from training import encoder_kernels
from training.batch_plan import batch_by_tokens
from training.encoding import Encoded, encode_pairs, pad

if TYPE_CHECKING:
    from cluster.config import ScorerConfig, TrainingConfig

Dtype = Literal["auto", "bfloat16", "float32"]

CHECKPOINTS = "_checkpoints"
SCORER_FILES = (
    r"(adapter_|generation_)?config\.json|(adapter_)?model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json",
    r"tokenizer[^/]*|special_tokens_map\.json|added_tokens\.json|chat_template\.jinja|vocab\.(txt|json)|merges\.txt|(spiece|sentencepiece\.bpe)\.model",
    r"README\.md|config\.yaml|metrics\.jsonl|loss\.svg|calibration\.svg|results\.json",
)
"""The files of a scorer or its adapters beside the manifest, as `artifacts.OwnedFiles` takes them."""
"""Folder beside the model files while it is being trained; a folder that has it and no manifest is not finished."""

# Padded tokens in one forward pass; more only costs memory once the cores are busy.
_SCORING_TOKENS = {"cpu": 4096, "cuda": 65536}
# Pairs tokenised and sorted together when scoring, so that memory stays flat however many there are.
_SCORING_PAIRS = 8192
# The names under which encoder families keep the dropout on attention probabilities.
_ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout")


def pick_dtype(dtype: Dtype, device: torch.device) -> Literal["bfloat16", "float32"]:
    """Return `dtype` with `auto` decided: bfloat16 where the hardware multiplies it natively, else float32."""
    if dtype != "auto":
        return dtype
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if native else "float32"


def autocast(dtype: Literal["bfloat16", "float32"], device: torch.device) -> AbstractContextManager[Any]:
    """The arithmetic of a forward pass: bfloat16 products over float32 weights, or plain float32."""
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()


def longest_input(model: nn.Module) -> int:
    """Return how many tokens a model can read: the rows of its position table, or what its config says where it has none."""
    table = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    if isinstance(table, nn.Embedding):
        # RoBERTa's positions start behind its padding id.
        return int(table.num_embeddings) - (0 if table.padding_idx is None else int(table.padding_idx) + 1)
    if getattr(model.config, "position_biased_input", True) is False:
        return 1 << 30  # DeBERTa's relative positions have no end
    return int(getattr(model.config, "max_position_embeddings", 0)) or 1 << 30


def load_tokenizer(folder: Path, name: str, setting: str) -> Any:
    """Return the tokenizer in a model folder. Raises `CappyError` when there is none that knows which token came from which text."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CappyError(
            f"{setting}={name}: no tokenizer can be loaded ({_first_line(error)}); save one there with save_pretrained"
        ) from None
    if not tokenizer.is_fast:
        raise CappyError(f"{setting}={name}: the tokenizer has no fast version; save one with a tokenizer.json there")
    return tokenizer


def new_model(encoder_folder: Path, scorer: ScorerConfig, training: TrainingConfig, seed: int) -> Any:
    """Return a one-logit regression model on the encoder in a folder, in float32, a missing head drawn from `seed`.

    Raises `CappyError` when the folder holds no encoder transformers can put a head on, or when it cannot read
    `scorer.max_length` tokens; `UsageError` when its attention dropout cannot be set.
    """
    try:
        config = AutoConfig.from_pretrained(encoder_folder, num_labels=1, problem_type="regression")
    except (OSError, ValueError, KeyError) as error:
        raise CappyError(f"scorer.encoder={scorer.encoder}: not a model transformers knows ({_first_line(error)})") from None
    names = [name for name in _ATTENTION_DROPOUT if hasattr(config, name)]
    if not names:
        raise UsageError(
            f"training.attention_dropout={training.attention_dropout}: scorer.encoder={scorer.encoder} ({config.model_type}) has none "
            f"to set; choose a BERT, RoBERTa, DeBERTa or ModernBERT encoder"
        )
    for name in names:
        setattr(config, name, training.attention_dropout)
    with torch.random.fork_rng(devices=[]), _quiet():
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
            f"scorer.max_length={scorer.max_length} is above the {longest_input(model)} tokens {scorer.encoder} can read; lower it"
        )
    model.config.cappy = None  # a blend's weight was fitted with the weights that are about to change
    # sentence-transformers and vLLM put a sigmoid on a single label unless the config says otherwise.
    model.config.sentence_transformers = {"activation_fn": "torch.nn.modules.linear.Identity"}
    encoder_kernels.compute_first_token_only(model)
    return model


@dataclass(frozen=True)
class Choice:
    """The best of an instruction's candidates."""

    index: int
    """Its place among the candidates; the first of equals."""
    response: str
    score: float
    scores: np.ndarray
    """float32 (candidates,): the raw logit of each."""


class Scorer:
    """A trained scorer, ready to score pairs. Build one with `Scorer.load`."""

    def __init__(self, model: Any, tokenizer: Any, max_length: int, dtype: Dtype = "float32", device: torch.device | None = None) -> None:
        self.device = device or next(model.parameters()).device
        self.model = model.to(self.device).eval()
        self.tokenizer = tokenizer
        self.max_length = max_length
        """Tokens of instruction plus response the model reads."""
        self.dtype = pick_dtype(dtype, self.device)

    @classmethod
    def load(cls, name: str, dtype: Dtype = "float32", device: str | torch.device | None = None, setting: str = "scorer_path") -> Scorer:
        """Load a scorer `cappy train` or `cappy adapt` published, or any one-label Hugging Face model: a folder, hub name or s3:// folder.

        Where it holds adapters their base is loaded and they are added into its weights.
        `dtype` float32 keeps close candidates apart; bfloat16 is faster and right to about 0.01. `device` null is the GPU
        where there is one. Raises `CappyError` naming `setting` when it is not a finished one-label model.
        """
        from cluster import models

        refuse_unfinished(name)
        folder = models.resolve(name, setting, adapters=True)
        plain = (folder / "config.json").exists()
        model, tokenizer = _load_whole(folder, name, setting) if plain else _load_adapted(folder, name, setting)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        scorer = cls(model, tokenizer, min(tokenizer.model_max_length, longest_input(model)), dtype, device)
        if scorer.dtype == "bfloat16":
            # What is not trained needs no finer weights, and casting them for each product takes time.
            scorer.model.to(torch.bfloat16)
        if scorer.device.type == "cpu":
            encoder_kernels.pack_for_cpu(scorer.model)
        return scorer

    @property
    def logprob_weight(self) -> float | None:
        """The blend's weight of the LLM's mean log-probability, in score per nat (`training.blend`); None where none was fitted.

        Raises `CappyError` where the config has something else in its place.
        """
        ours = getattr(self.model.config, "cappy", None) or {}
        try:
            weight = (ours.get("blend") or {}).get("logprob_weight")
            return None if weight is None else float(weight)
        except (AttributeError, TypeError, ValueError):
            raise CappyError(f"config.json has cappy={ours!r}, which no `cappy train` wrote; mend it or take `cappy` out") from None

    def score(self, instructions: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """Return the raw logit of each pair, float32 (pairs,), in the order given.

        Raises `ValueError` when the lists differ in length.
        """
        return self.score_and_count(instructions, responses)[0]

    def score_and_count(self, instructions: Sequence[str], responses: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the scores as `score` does, and the tokens read of each pair, int64 (pairs,)."""
        if len(instructions) != len(responses):
            raise ValueError(f"{len(instructions)} instructions and {len(responses)} responses; give one response for each instruction")
        scores, lengths = [np.zeros(0, np.float32)], [np.zeros(0, np.int64)]
        for start in range(0, len(instructions), _SCORING_PAIRS):
            some = slice(start, start + _SCORING_PAIRS)
            encoded = encode_pairs(self.tokenizer, instructions[some], responses[some], self.max_length)
            scores.append(self.score_encoded(encoded))
            lengths.append(encoded.lengths)
        return np.concatenate(scores), np.concatenate(lengths)

    def score_encoded(self, encoded: Encoded) -> np.ndarray:
        """Return the raw logit of each tokenised pair, float32 (pairs,), in the order given."""
        scores = np.zeros(len(encoded), np.float32)
        budget = _SCORING_TOKENS[self.device.type]
        arithmetic = nullcontext() if self.model.dtype == torch.bfloat16 else autocast(self.dtype, self.device)
        with torch.inference_mode(), arithmetic:
            for rows in batch_by_tokens(encoded.lengths, budget):
                inputs = pad(encoded, rows, self.tokenizer.pad_token_id, self.device)
                logits_B1 = self.model(**inputs).logits
                scores[rows] = logits_B1[:, 0].float().cpu().numpy()
        return scores

    def best(self, instruction: str, candidates: Sequence[str]) -> Choice:
        """Return the candidate with the highest score. Raises `ValueError` when there are none."""
        if not candidates:
            raise ValueError("there are no candidates to choose from; give at least one")
        # Each different one once: in a batch, equal rows may differ by roundings.
        distinct = {candidate: place for place, candidate in enumerate(dict.fromkeys(candidates))}
        scores = self.score([instruction] * len(distinct), list(distinct))[[distinct[candidate] for candidate in candidates]]
        index = int(scores.argmax())
        return Choice(index, candidates[index], float(scores[index]), scores)

    def save(self, folder: str | Path) -> None:
        """Write what plain `AutoModelForSequenceClassification.from_pretrained` and `AutoTokenizer.from_pretrained` load."""
        self.tokenizer.model_max_length = self.max_length
        with _quiet():
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)


def _load_whole(folder: Path, name: str, setting: str) -> tuple[Any, Any]:
    """Return the float32 model and the tokenizer of a folder that holds both."""
    tokenizer = load_tokenizer(folder, name, setting)
    with _quiet():
        try:
            model, report = AutoModelForSequenceClassification.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise CappyError(f"{setting}={name}: not a model that can score ({_first_line(error)})") from None
    if model.config.num_labels != 1:
        labels = model.config.num_labels
        raise CappyError(f"{setting}={name}: the model has {labels} labels, a scorer has one; point it at what `cappy train` wrote")
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise CappyError(f"{setting}={name}: the weights lack {missing}, so no head was trained; run `cappy train` on it first")
    encoder_kernels.compute_first_token_only(model)
    return model, tokenizer


def _load_adapted(folder: Path, name: str, setting: str) -> tuple[Any, Any]:
    """Return the base that adapters name, checked against the weights they were trained on, with them merged, and its tokenizer."""
    from cluster import models
    from training import lora

    said = lora.read_base(folder)
    base = models.resolve(said["uri"], f"base of {setting}={name}")
    if said.get("sha256", "") not in ("", lora.weights_sha256(base)):
        raise CappyError(f"{setting}={name}: its base {said['uri']} has other weights than it was adapted from; adapt it again")
    refuse_unfinished(said["uri"])
    model, tokenizer = _load_whole(base, said["uri"], f"base of {setting}={name}")
    model.config.cappy = None  # the blend's weight was fitted with the base alone
    return lora.merge_adapters(model, folder, f"{setting}={name}"), tokenizer


def refuse_unfinished(name: str) -> None:
    """Raise `CappyError` when `name` is a folder of ours without a finished scorer; plain model folders and hub names pass."""
    from cluster import artifacts, storage

    if not storage.is_s3(name) and not Path(name).expanduser().is_dir():
        return
    if storage.exists(storage.join(name, artifacts.MANIFEST)) or storage.exists(storage.join(name, CHECKPOINTS)):
        artifacts.read_manifest(name, "scorer", "train")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' loading bars and reports off the operator's terminal."""
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
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
