"""The LLM's likelihood of given answers: log-probabilities of the choices of a classification row. Imports torch; no Ray, no files.

The choices of a row share their prompt. One forward pass has the prompt once and all choices behind it. A choice attends to the prompt
and to itself, and its positions continue those of the prompt, so its log-probability equals that of a separate pass. A model whose
attention does not allow this is detected with a test input, and then gets one sequence for each choice.

Shapes: B rows of a batch, C choices of a row, L tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cluster import models
from cluster.config import SamplerConfig
from cluster.errors import UsageError
from generation import prompts
from generation.engines.prompt_encoding import encode_prompt
from training.scorer import pick_dtype, quiet

Floats = NDArray[np.float64]
_BATCH_TOKENS = 2048
_TOLERANCE = 0.05  # nats; bfloat16 differs by less on the test input
_Pack = tuple[list[int], list[list[int]]]


class ChoiceLikelihood:
    """A causal LLM that computes log-probabilities of given texts."""

    def __init__(self, config: SamplerConfig, neutral_prompt: str) -> None:
        """Load the model of `sampler.model` with transformers.

        `neutral_prompt` is the prompt of the unconditional likelihood. Raises `UsageError` for an endpoint, whose weights are not here.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if config.engine.kind != "vllm":
            raise UsageError(
                f"sampler.engine.kind={config.engine.kind}: the likelihood of choices needs a decoder-only model on this machine; "
                f"set suite.likelihood=false or use engine.kind=vllm"
            )
        folder = models.resolve(config.model, "sampler.model")
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = config.engine.dtype
        name = pick_dtype("float32" if dtype == "float32" else "auto", self._device)
        with models.one_line_errors(config.model, "sampler.model"), quiet():
            self._tokenizer = AutoTokenizer.from_pretrained(folder)
            self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, name)).to(self._device).eval()
        self._prompt, self._neutral = config.prompt, neutral_prompt
        self._limit = config.engine.max_model_len
        self._unconditional: dict[str, float] = {}
        self.tokens = 0
        """Tokens read so far, prompts and choices."""
        self._packed = True
        self._packed = self._can_pack()

    def score(self, instructions: Sequence[str], choices: Sequence[Sequence[str]]) -> list[Floats]:
        """Return three numbers for each choice of each instruction, (3, C).

        They are the sum of the log-probabilities of the tokens of the choice after the instruction, in nats, their number, and the sum
        after the neutral prompt. A prompt that is too long loses tokens at its start.
        """
        continuations = [self._continuations(text, answers) for text, answers in zip(instructions, choices, strict=True)]
        self._add_unconditional({text for texts in continuations for text in texts})
        return [
            np.stack([*numbers, [self._unconditional[text] for text in texts]])
            for numbers, texts in zip(self.sums(instructions, choices), continuations, strict=True)
        ]

    def sums(self, instructions: Sequence[str], choices: Sequence[Sequence[str]]) -> list[Floats]:
        """Return the first two numbers of `score`, (2, C): the sum of the log-probabilities of the choice, and its tokens."""
        packs = [
            self._pack(self._encode(text), self._continuations(text, answers)) for text, answers in zip(instructions, choices, strict=True)
        ]
        found = self._sums(packs)
        return [np.stack([sums_C, [float(len(ids)) for ids in answers]]) for sums_C, (_, answers) in zip(found, packs, strict=True)]

    def _encode(self, instruction: str) -> list[int]:
        turns = prompts.messages(instruction, system=self._prompt.system)
        return encode_prompt(
            self._tokenizer, turns, self._prompt.form, self._limit, template_kwargs=self._prompt.chat_template_kwargs or None
        )

    def _continuations(self, instruction: str, choices: Sequence[str]) -> list[str]:
        """Return the text of each choice as it continues the prompt: with a space before it, if the prompt ends in a cue such as `A:`."""
        if self._prompt.form == "chat":
            return [choice.strip() for choice in choices]
        turns = prompts.messages(instruction)
        start = len(prompts.raw_text(turns))
        return [prompts.raw_text([*turns, {"role": "assistant", "content": choice}])[start:] for choice in choices]

    def _pack(self, prompt: list[int], texts: Sequence[str]) -> _Pack:
        answers = [self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        room = max(1, self._limit - max(map(len, answers)))
        return (prompt[-room:] or [self._tokenizer.bos_token_id or 0]), answers

    def _add_unconditional(self, texts: set[str]) -> None:
        """Compute the log-probabilities after the neutral prompt that are not known yet."""
        missing = sorted(texts - self._unconditional.keys())
        packs = []
        for text in missing:
            # A choice without a space before it starts a line.
            prompt = self._neutral if self._prompt.form == "chat" or text.startswith(" ") else f"{self._neutral}\n"
            ids = self._encode(self._neutral) if self._prompt.form == "chat" else list(self._tokenizer(prompt)["input_ids"])
            packs.append(self._pack(ids, [text]))
        for text, sums_C in zip(missing, self._sums(packs), strict=True):
            self._unconditional[text] = float(sums_C[0])

    def _can_pack(self) -> bool:
        """Return whether the model gives a choice the same log-probability in one sequence with others and in a separate one."""
        pack = self._pack(self._encode("Is a fox red, or is it blue?"), ["Yes, it is", "No", "It is blue"])
        try:
            together = self._sums([pack])[0]
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError):
            return False
        self._packed = False
        return bool(np.abs(together - self._sums([pack])[0]).max() < _TOLERANCE)

    def _sums(self, packs: Sequence[_Pack]) -> list[Floats]:
        """Return the sum of the log-probabilities of each choice, (C,), by pack, in batches of similar length."""
        if not self._packed:
            single = [(prompt, [answer]) for prompt, answers in packs for answer in answers]
            values = iter(self._batches(single))
            return [np.concatenate([next(values) for _ in answers]) for _, answers in packs]
        return self._batches(packs)

    def _batches(self, packs: Sequence[_Pack]) -> list[Floats]:
        lengths = [len(prompt) + sum(map(len, answers)) for prompt, answers in packs]
        found: list[Floats] = [np.empty(0)] * len(packs)
        batch: list[int] = []
        for index in [*sorted(range(len(packs)), key=lambda index: lengths[index]), -1]:
            if batch and (index < 0 or (len(batch) + 1) * lengths[index] > _BATCH_TOKENS):
                for position, sums_C in zip(batch, self._forward([packs[each] for each in batch]), strict=True):
                    found[position] = sums_C
                batch = []
            if index >= 0:
                batch.append(index)
        return found

    def _forward(self, packs: Sequence[_Pack]) -> list[Floats]:
        lengths = [len(prompt) + sum(map(len, answers)) for prompt, answers in packs]
        longest = max(lengths)
        self.tokens += sum(lengths)
        ids_BL = torch.zeros(len(packs), longest, dtype=torch.long)
        positions_BL = torch.zeros_like(ids_BL)
        seen_BLL = torch.eye(longest, dtype=torch.bool).repeat(len(packs), 1, 1)  # padding attends to itself
        sources: list[tuple[int, int]] = []  # the position that predicts each token of a choice
        targets: list[int] = []
        sizes: list[int] = []
        for row, (prompt, answers) in enumerate(packs):
            start = len(prompt)
            ids_BL[row, :start] = torch.tensor(prompt)
            positions_BL[row, :start] = torch.arange(start)
            seen_BLL[row, :start, :start] = torch.ones(start, start).tril().bool()
            at = start
            for answer in answers:
                end = at + len(answer)
                ids_BL[row, at:end] = torch.tensor(answer, dtype=torch.long)
                positions_BL[row, at:end] = torch.arange(start, start + len(answer))
                seen_BLL[row, at:end, :start] = True
                seen_BLL[row, at:end, at:end] = torch.ones(len(answer), len(answer)).tril().bool()
                sources += [(row, start - 1), *((row, position) for position in range(at, end - 1))][: len(answer)]
                targets += answer
                sizes.append(len(answer))
                at = end
        dtype = self._model.dtype
        hidden = torch.zeros(seen_BLL.shape, dtype=dtype).masked_fill(~seen_BLL, torch.finfo(dtype).min)
        with torch.inference_mode():
            states_BLD = self._model.base_model(
                input_ids=ids_BL.to(self._device),
                attention_mask=hidden[:, None].to(self._device),
                position_ids=positions_BL.to(self._device),
                use_cache=False,
            ).last_hidden_state
            rows, places = torch.tensor(sources, dtype=torch.long).T
            logits = self._model.lm_head(states_BLD[rows.to(self._device), places.to(self._device)]).float()
            logprobs = logits.log_softmax(-1)[torch.arange(len(targets)), torch.tensor(targets).to(self._device)]
        sums = np.array([part.sum().item() for part in logprobs.cpu().double().split(sizes)], np.float64)
        bounds = np.cumsum([len(answers) for _, answers in packs])[:-1]
        return np.split(sums, bounds)
