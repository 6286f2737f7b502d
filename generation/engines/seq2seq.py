"""Encoder-decoder models (T5, FLAN-T5, T0, BART) by transformers, in batches of this module's own making. Knows no Ray.

Requests wait in a queue; the longest prompts that fit a budget are run together. A prompt is encoded once for all its
candidates of all its decodings. Every draw is a function of (seed, number of the draw, step) and of the model's
distribution, never of the company in the batch, which reaches a candidate only by the rounding of the arithmetic (with
`dtype: float32` in practice not at all). Candidates are drawn from the model's own distribution: of its generation
config only the special tokens count, not the habits (n-gram bans, a forced end) some checkpoints carry.

Letters: P prompts, L tokens of the longest, H hidden units, R rows (candidates), T candidate tokens, V vocabulary.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from cluster import models
from cluster.config import DecodingConfig, Seq2SeqConfig
from cluster.errors import CappyError
from generation import prompts
from generation.engines import prompt_encoding
from generation.engines.contract import Candidate, OnCandidate, PromptTooLong, has_gpu

# What one row asks for arrives within this; a batch that runs takes far longer.
_GATHER_S = 0.002
# Rows that ended stay in the batch until they are this share of it: taking them out copies the caches.
_ENDED_SHARE = 0.25
# Tokens top_p looks at before it sorts a whole vocabulary, which takes longer than the model's step.
_HEAD = 512
# Rows read at once after a beam search: their logits, [R, T, V], are large.
_READ_ROWS = 32


@dataclass(eq=False)
class _Request:
    ids: tuple[int, ...]
    decoding: DecodingConfig
    seed: int
    answer: asyncio.Future[list[Candidate]]

    @property
    def rows(self) -> int:
        return max(self.decoding.n, self.decoding.beams)


class Seq2SeqEngine:
    """An encoder-decoder model on one GPU, or on all cores where there is none."""

    def __init__(self, model: str, config: Seq2SeqConfig, setting: str = "sampler.model") -> None:
        from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

        folder = models.resolve(model, setting)
        kind = AutoConfig.from_pretrained(folder)
        if not kind.is_encoder_decoder:
            raise CappyError(f"{setting}={model} is no encoder-decoder but a {kind.model_type}; set sampler.engine.kind=vllm")
        positions = getattr(kind, "max_position_embeddings", None)
        if positions and config.max_prompt_tokens > positions:
            raise CappyError(f"sampler.engine.max_prompt_tokens={config.max_prompt_tokens} is above the model's {positions} positions")
        gpu = has_gpu()
        if not gpu:
            # Ray gives every worker OMP_NUM_THREADS=1 for its own share; the engine is meant to have the machine.
            torch.set_num_threads(len(os.sched_getaffinity(0)))
        # Where the hardware multiplies it natively; elsewhere it is slower than single precision.
        bfloat16 = gpu or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        dtype = torch.bfloat16 if config.dtype == "bfloat16" or (config.dtype == "auto" and bfloat16) else torch.float32
        self.device = torch.device("cuda" if gpu else "cpu")
        self.model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=dtype).to(self.device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        own = self.model.generation_config
        start = own.decoder_start_token_id if own.decoder_start_token_id is not None else kind.decoder_start_token_id
        self.prefix = [start, *([own.forced_bos_token_id] if own.forced_bos_token_id is not None else [])]
        self.ends = torch.tensor(np.atleast_1d(own.eos_token_id), device=self.device)
        self.pad = own.pad_token_id if own.pad_token_id is not None else int(self.ends[0])
        self.model.generation_config = GenerationConfig(
            decoder_start_token_id=start, eos_token_id=self.ends.tolist(), pad_token_id=self.pad, bos_token_id=own.bos_token_id
        )
        self.max_prompt_tokens = config.max_prompt_tokens
        self.batch_tokens = config.batch_tokens
        self.dead = False
        self._waiting: list[_Request] = []
        self._worker: asyncio.Task[None] | None = None
        # One thread, so that the event loop goes on taking requests and torch keeps its own threads.
        self._thread = ThreadPoolExecutor(max_workers=1)

    def encode(self, turns: Sequence[prompts.Message], form: str, room: int, drop_shots: bool = True) -> list[int]:
        """Return the prompt's token ids, shots dropped from the front until they fit. A candidate needs no `room` in it.

        Raises `PromptTooLong` when the instruction alone does not fit, or with `drop_shots=False` all turns together.
        """
        ids = prompt_encoding.encode_prompt(self.tokenizer, turns, form, self.max_prompt_tokens, drop_shots)
        if len(ids) > self.max_prompt_tokens:
            raise PromptTooLong(
                f"the prompt has {len(ids)} tokens, above max_prompt_tokens={self.max_prompt_tokens}; "
                f"shorten the instruction or raise sampler.engine.max_prompt_tokens"
            )
        return ids

    async def sample(
        self,
        prompt: Sequence[int],
        decoding: DecodingConfig,
        seed: int | None,
        request_id: str,
        *,
        logprobs: bool = True,
        on_candidate: OnCandidate | None = None,
    ) -> list[Candidate]:
        """Return the `decoding.n` candidates of one prompt, with log-probabilities in any case.

        A call cancelled before its batch starts is left out of it.
        """
        seed = random.getrandbits(31) if seed is None else seed
        request = _Request(tuple(prompt), decoding, seed, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        candidates = await request.answer
        if on_candidate:
            for candidate in candidates:
                on_candidate(candidate)
        return candidates

    def max_cost(self, prompt: Sequence[int], decoding: DecodingConfig) -> float:
        return 0.0

    def pop_cost(self, request_id: str) -> float:
        return 0.0

    def prompt_tokens(self, prompt: Sequence[int], request_id: str) -> int:
        return len(prompt)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _work(self) -> None:
        """Run batches until nothing waits."""
        while True:
            await asyncio.sleep(_GATHER_S)
            self._waiting = [request for request in self._waiting if not request.answer.done()]
            if not self._waiting:
                return
            batch = self._take()
            try:
                pools = await asyncio.get_running_loop().run_in_executor(self._thread, self._run, batch)
            except torch.OutOfMemoryError as error:
                self._halve(batch, error)
            except Exception as error:
                # After an error of the GPU itself every later call fails too.
                self.dead = isinstance(error, torch.AcceleratorError)
                _fail(batch, error)
            else:
                for request, pool in zip(batch, pools, strict=True):
                    if not request.answer.done():
                        request.answer.set_result(pool)

    def _take(self) -> list[_Request]:
        """Take from the queue the longest prompts that fit `batch_tokens` together, one at least, each with all its decodings."""
        by_prompt: dict[tuple[int, ...], list[_Request]] = {}
        for request in self._waiting:
            by_prompt.setdefault(request.ids, []).append(request)
        longest_first = sorted(by_prompt, key=len, reverse=True)
        batch: list[_Request] = []
        rows: Counter[str] = Counter()
        for ids in longest_first:
            for request in by_prompt[ids]:
                rows[request.decoding.name] += request.rows
            if batch and len(longest_first[0]) * max(rows.values()) > self.batch_tokens:
                break
            batch += by_prompt[ids]
        taken = set(batch)
        self._waiting = [request for request in self._waiting if request not in taken]
        return batch

    def _halve(self, batch: list[_Request], error: torch.OutOfMemoryError) -> None:
        """Try a batch that was too large for the memory again, in smaller ones."""
        if len({request.ids for request in batch}) == 1:
            return _fail(batch, error)
        rows = Counter[str]()
        for request in batch:
            rows[request.decoding.name] += request.rows
        self.batch_tokens = max(len(request.ids) for request in batch) * max(rows.values()) // 2
        self._waiting = batch + self._waiting
        torch.cuda.empty_cache()

    def _run(self, batch: list[_Request]) -> list[list[Candidate]]:
        """Return the candidates of each request."""
        with torch.inference_mode():
            places = {ids: place for place, ids in enumerate(dict.fromkeys(request.ids for request in batch))}
            length = max(map(len, places))
            ids_PL = torch.tensor([[*ids, *[self.pad] * (length - len(ids))] for ids in places], device=self.device)
            mask_PL = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in places], device=self.device)
            states_PLH = self.model.get_encoder()(input_ids=ids_PL, attention_mask=mask_PL).last_hidden_state
            pools: dict[_Request, list[Candidate]] = {}
            for decoding in dict.fromkeys(request.decoding for request in batch):
                asking = [request for request in batch if request.decoding == decoding]
                at = torch.tensor([places[request.ids] for request in asking], device=self.device)
                draw = self._beams if decoding.beams > 1 else self._draw
                candidates = draw(states_PLH[at], mask_PL[at], decoding, [request.seed for request in asking])
                for position, request in enumerate(asking):
                    pools[request] = candidates[position * decoding.n : (position + 1) * decoding.n]
            return [pools[request] for request in batch]

    def _draw(self, states_PLH: torch.Tensor, mask_PL: torch.Tensor, decoding: DecodingConfig, seeds: Sequence[int]) -> list[Candidate]:
        """Return `decoding.n` candidates a prompt, prompt by prompt, sampled token by token."""
        states_RLH = states_PLH.repeat_interleave(decoding.n, dim=0)
        mask_RL = mask_PL.repeat_interleave(decoding.n, dim=0)
        rows = len(states_RLH)
        uniform_RT = torch.tensor(
            np.stack([np.random.default_rng((seed, draw)).random(decoding.max_tokens) for seed in seeds for draw in range(decoding.n)]),
            device=self.device,
        )
        drawn_RT = torch.full((rows, decoding.max_tokens), self.pad, device=self.device)
        logprob_RT = torch.zeros((rows, decoding.max_tokens), device=self.device)
        length_R = [0] * rows
        # The rows of the batch now: their numbers, and which of them have ended and wait to be taken out.
        live = torch.arange(rows, device=self.device)
        ended = torch.zeros(rows, dtype=torch.bool, device=self.device)
        inputs = torch.tensor([self.prefix] * rows, device=self.device)
        cache = None
        for step in range(decoding.max_tokens):
            output = self.model(
                encoder_outputs=(states_RLH,), attention_mask=mask_RL, decoder_input_ids=inputs, past_key_values=cache, use_cache=True
            )
            cache = output.past_key_values
            logits = output.logits[:, -1].float()
            total = logits.logsumexp(-1)
            if step < decoding.min_tokens:
                logits[:, self.ends] = -torch.inf
            token = choose_tokens(logits, decoding, uniform_RT[live, step])
            drawn_RT[live, step] = token
            logprob_RT[live, step] = logits.gather(1, token[:, None])[:, 0] - total
            ending = torch.isin(token, self.ends)
            if decoding.stop:
                texts = drawn_RT[live, : step + 1].tolist()
                ending |= torch.tensor([self._stop(ids, decoding) is not None for ids in texts], device=self.device)
            for row in live[ending & ~ended].tolist():
                length_R[row] = step + 1
            ended |= ending
            if bool(ended.all()):
                break
            if ended.sum() >= _ENDED_SHARE * len(ended):
                keep = (~ended).nonzero()[:, 0]
                cache.batch_select_indices(keep)
                states_RLH, mask_RL, live, token, ended = states_RLH[keep], mask_RL[keep], live[keep], token[keep], ended[keep]
            inputs = token[:, None]
        return [
            self._candidate(ids, logprobs, length, decoding)
            for ids, logprobs, length in zip(drawn_RT.tolist(), logprob_RT.tolist(), length_R, strict=True)
        ]

    def _beams(self, states_PLH: torch.Tensor, mask_PL: torch.Tensor, decoding: DecodingConfig, seeds: Sequence[int]) -> list[Candidate]:
        """Return the best `decoding.n` candidates of transformers' beam search a prompt, prompt by prompt."""
        from transformers.modeling_outputs import BaseModelOutput

        drawn_RT = self.model.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=states_PLH),
            attention_mask=mask_PL,
            decoder_input_ids=torch.tensor([self.prefix] * len(states_PLH), device=self.device),
            num_beams=decoding.beams,
            num_return_sequences=decoding.n,
            do_sample=False,
            min_new_tokens=decoding.min_tokens or None,
            max_new_tokens=decoding.max_tokens,
        )[:, len(self.prefix) :]
        # The search's own scores are its ranking's; the log-probabilities are those of the model reading what it wrote.
        states_RLH, mask_RL = (each.repeat_interleave(decoding.n, dim=0) for each in (states_PLH, mask_PL))
        parts = zip(*(each.split(_READ_ROWS) for each in (states_RLH, mask_RL, drawn_RT)), strict=True)
        logprob_RT = torch.cat([self._read(*part) for part in parts])
        ends = set(self.ends.tolist())
        candidates = []
        for ids, values in zip(drawn_RT.tolist(), logprob_RT.tolist(), strict=True):
            lengths = range(1, len(ids) + 1)
            length = next((each for each in lengths if ids[each - 1] in ends or self._stop(ids[:each], decoding) is not None), 0)
            candidates.append(self._candidate(ids[: decoding.max_tokens], values, length, decoding))
        return candidates

    def _read(self, states_RLH: torch.Tensor, mask_RL: torch.Tensor, drawn_RT: torch.Tensor) -> torch.Tensor:
        """Return the log-probability of each token of finished candidates, [R, T]."""
        inputs = torch.cat([torch.tensor([self.prefix] * len(drawn_RT), device=self.device), drawn_RT[:, :-1]], dim=1)
        logits = self.model(encoder_outputs=(states_RLH,), attention_mask=mask_RL, decoder_input_ids=inputs).logits
        logits_RTV = logits[:, len(self.prefix) - 1 :].float()
        return logits_RTV.gather(2, drawn_RT[:, :, None])[:, :, 0] - logits_RTV.logsumexp(-1)

    def _stop(self, ids: Sequence[int], decoding: DecodingConfig) -> str | None:
        """Return the text before the first stop string behind the first `min_tokens` tokens, or None where there is none."""
        if not decoding.stop or len(ids) <= decoding.min_tokens:
            return None
        text = self._text(ids)
        start = len(self._text(ids[: decoding.min_tokens]))
        found = [at for stop in decoding.stop if (at := text.find(stop, start)) >= 0]
        return text[: min(found)] if found else None

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _candidate(self, ids: Sequence[int], logprobs: Sequence[float], length: int, decoding: DecodingConfig) -> Candidate:
        """A candidate of the first `length` tokens, or of all where it did not end (0)."""
        drawn = ids[: length or None]
        text = self._stop(drawn, decoding)
        return Candidate(
            response=(self._text(drawn) if text is None else text).strip(),
            decoding=decoding.name,
            tokens=len(drawn),
            finish_reason="stop" if length else "length",
            logprob=sum(logprobs[: len(drawn)]),
        )


def choose_tokens(logits_RV: torch.Tensor, decoding: DecodingConfig, uniform_R: torch.Tensor) -> torch.Tensor:
    """Return a token a row, [R]: the likeliest at temperature 0, else the one at `uniform_R` (in [0, 1)) of the distribution
    that temperature, then top_k, then top_p leave."""
    if decoding.temperature == 0:
        return logits_RV.argmax(-1)
    logits, order = logits_RV / decoding.temperature, None
    if decoding.top_k:
        logits, order = logits.topk(min(decoding.top_k, logits.shape[-1]))
    mass = logits.softmax(-1)
    if decoding.top_p < 1 and order is None:
        mass, order = _likeliest(mass, decoding.top_p)
    # Running sums in double: over a whole vocabulary single ones lose the rarest tokens.
    mass = mass.cumsum(-1, dtype=torch.float64)
    last = torch.full_like(uniform_R, logits.shape[-1] - 1, dtype=torch.int64)[:, None]
    if decoding.top_p < 1:
        # The fewest tokens whose mass reaches top_p.
        last = (mass < decoding.top_p).sum(-1, keepdim=True).minimum(last)
    position = torch.searchsorted(mass, uniform_R[:, None] * mass.gather(1, last), right=True).minimum(last)
    return (position if order is None else order.gather(1, position))[:, 0]


def _likeliest(mass_RV: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the probabilities in descending order and their tokens: as many as reach `top_p`, or all."""
    head, tokens = mass_RV.topk(min(_HEAD, mass_RV.shape[-1]))
    if bool((head.sum(-1) >= top_p).all()):
        return head, tokens
    return tuple(mass_RV.sort(descending=True))


def _fail(batch: Sequence[_Request], error: Exception) -> None:
    for request in batch:
        if not request.answer.done():
            request.answer.set_exception(error)
