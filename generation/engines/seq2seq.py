"""The engine for encoder-decoder models (T5, FLAN-T5, T0, BART), with transformers and its own batching. Imports no Ray.

Requests wait in a queue. A batch takes the longest prompts whose padded size fits in `batch_tokens`. A prompt is encoded once for all
candidates of all its decodings.

Each draw is a function of (seed, number of the draw, step) and the distribution of the model. The other prompts in the batch change it
only by rounding errors, and with `dtype: float32` in practice not at all. Candidates come from the unmodified distribution of the
model: only the special tokens of its generation config are used. Other options there, e.g. n-gram bans or a forced end, are ignored.

Shapes: P prompts, L tokens of the longest prompt, H hidden units, R rows (candidates), T candidate tokens, V vocabulary.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cluster import models
from cluster.config import DecodingConfig, Seq2SeqConfig
from cluster.cpu import multiplies_bfloat16
from cluster.errors import CappyError
from generation import prompts
from generation.engines import prompt_encoding
from generation.engines.contract import Candidate, OnCandidate, PromptTooLong, has_gpu
from generation.engines.reasoning import strip_reasoning
from generation.logprobs import sum_logprobs

# Time to collect requests for a batch: all requests of one row arrive within it, and a batch runs far longer.
_GATHER_S = 0.002
# Finished rows stay in the batch until they are this share of it, because their removal copies the caches.
_FINISHED_SHARE = 0.25
# Number of most likely tokens that top_p checks before it sorts the whole vocabulary, which is slower than a step of the model.
_TOP_P_HEAD = 512
# Batch size for the log-probabilities after a beam search: the logits, [R, T, V], are large.
_LOGPROB_ROWS = 32


@dataclass(eq=False)
class _Request:
    """One `sample` call in the queue."""

    ids: tuple[int, ...]
    decoding: DecodingConfig
    seed: int
    answer: asyncio.Future[list[Candidate]]

    @property
    def rows(self) -> int:
        """Rows of the decoder batch."""
        return max(self.decoding.n, self.decoding.beams)


class Seq2SeqEngine:
    """An encoder-decoder model on one GPU, or on all CPU cores of a machine without a GPU."""

    def __init__(
        self,
        model: str,
        config: Seq2SeqConfig,
        setting: str = "sampler.model",
        *,
        keep_reasoning: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Load the model.

        Args:
            model: a hub name, a local folder or an s3:// folder.
            config: the settings of the engine.
            setting: name of the setting that `model` comes from, for error messages.
            keep_reasoning: whether responses keep the reasoning that the model writes into them.
            template_kwargs: variables of the chat template.

        Raises `CappyError` for a model that is not an encoder-decoder, and for more `max_prompt_tokens` than the model has positions.
        """
        from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

        self._keep_reasoning, self._template_kwargs = keep_reasoning, template_kwargs
        folder = models.resolve(model, setting)
        kind = AutoConfig.from_pretrained(folder)
        if not kind.is_encoder_decoder:
            raise CappyError(f"{setting}={model} is a {kind.model_type} and not an encoder-decoder; set sampler.engine.kind=vllm")
        positions = getattr(kind, "max_position_embeddings", None)
        if positions and config.max_prompt_tokens > positions:
            raise CappyError(
                f"sampler.engine.max_prompt_tokens={config.max_prompt_tokens} is above the {positions} positions of {setting}={model}; "
                f"set it to {positions} or less"
            )
        gpu = has_gpu()
        if not gpu:
            # Ray sets OMP_NUM_THREADS=1 in each worker for its share of the machine; the engine may use all cores.
            torch.set_num_threads(len(os.sched_getaffinity(0)))
        bfloat16 = gpu or multiplies_bfloat16()
        dtype = torch.bfloat16 if config.dtype == "bfloat16" or (config.dtype == "auto" and bfloat16) else torch.float32
        self.device = torch.device("cuda" if gpu else "cpu")
        with models.one_line_errors(model, setting):
            loaded = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)
        self.model = loaded.to(self.device).eval()
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
        self._queue: list[_Request] = []
        self._worker: asyncio.Task[None] | None = None
        # The model runs in a separate thread, so that the event loop can accept requests meanwhile.
        self._thread = ThreadPoolExecutor(max_workers=1)

    def encode(self, turns: Sequence[prompts.Message], form: str, room: int, drop_shots: bool = True) -> list[int]:
        """Return the token ids of a prompt, with shots dropped from the front until it fits in `max_prompt_tokens`.

        `room` is ignored: the decoder has its own positions. `drop_shots=False` drops no turn. Raises `PromptTooLong` if the prompt
        does not fit.
        """
        ids = prompt_encoding.encode_prompt(self.tokenizer, turns, form, self.max_prompt_tokens, drop_shots, self._template_kwargs)
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
        """Return the `decoding.n` candidates of one prompt, always with log-probabilities.

        A call that is cancelled before its batch starts is removed from the queue.
        """
        seed = random.getrandbits(31) if seed is None else seed
        request = _Request(tuple(prompt), decoding, seed, asyncio.get_running_loop().create_future())
        self._queue.append(request)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._run_batches())
        candidates = await request.answer
        if on_candidate:
            for candidate in candidates:
                on_candidate(candidate)
        return candidates

    def max_cost(self, prompt: Sequence[int], decoding: DecodingConfig) -> float:
        """Return 0.0: a local engine costs no money."""
        return 0.0

    def pop_cost(self, request_id: str) -> float:
        """Return 0.0: a local engine costs no money."""
        return 0.0

    def prompt_tokens(self, prompt: Sequence[int], request_id: str) -> int:
        """Return the number of prompt tokens."""
        return len(prompt)

    def close(self) -> None:
        """Stop the thread of the model after the current batch."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run_batches(self) -> None:
        """Run batches until the queue is empty."""
        while True:
            await asyncio.sleep(_GATHER_S)
            self._queue = [request for request in self._queue if not request.answer.done()]
            if not self._queue:
                return
            batch = self._take_batch()
            try:
                pools = await asyncio.get_running_loop().run_in_executor(self._thread, self._sample_batch, batch)
            except torch.OutOfMemoryError as error:
                self._retry_in_smaller_batches(batch, error)
            except Exception as error:
                # After a hardware error of the GPU all later calls fail too.
                self.dead = isinstance(error, torch.AcceleratorError)
                _fail(batch, error)
            else:
                for request, pool in zip(batch, pools, strict=True):
                    if not request.answer.done():
                        request.answer.set_result(pool)

    def _take_batch(self) -> list[_Request]:
        """Remove from the queue the longest prompts that fit in `batch_tokens`, at least one, each with all its decodings."""
        by_prompt: dict[tuple[int, ...], list[_Request]] = {}
        for request in self._queue:
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
        self._queue = [request for request in self._queue if request not in taken]
        return batch

    def _retry_in_smaller_batches(self, batch: list[_Request], error: torch.OutOfMemoryError) -> None:
        """Halve `batch_tokens` after an out-of-memory error and put the batch back in the queue; fail a batch of one prompt."""
        if len({request.ids for request in batch}) == 1:
            return _fail(batch, error)
        rows = Counter[str]()
        for request in batch:
            rows[request.decoding.name] += request.rows
        self.batch_tokens = max(len(request.ids) for request in batch) * max(rows.values()) // 2
        self._queue = batch + self._queue
        torch.cuda.empty_cache()

    def _sample_batch(self, batch: list[_Request]) -> list[list[Candidate]]:
        """Return the candidates of each request."""
        with torch.inference_mode():
            index_of = {ids: index for index, ids in enumerate(dict.fromkeys(request.ids for request in batch))}
            length = max(map(len, index_of))
            ids_PL = torch.tensor([[*ids, *[self.pad] * (length - len(ids))] for ids in index_of], device=self.device)
            mask_PL = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in index_of], device=self.device)
            states_PLH = self.model.get_encoder()(input_ids=ids_PL, attention_mask=mask_PL).last_hidden_state
            pools: dict[_Request, list[Candidate]] = {}
            for decoding in dict.fromkeys(request.decoding for request in batch):
                requests = [request for request in batch if request.decoding == decoding]
                indices = torch.tensor([index_of[request.ids] for request in requests], device=self.device)
                sample = self._beam_search if decoding.beams > 1 else self._sample_tokens
                candidates = sample(states_PLH[indices], mask_PL[indices], decoding, [request.seed for request in requests])
                for position, request in enumerate(requests):
                    pools[request] = candidates[position * decoding.n : (position + 1) * decoding.n]
            return [pools[request] for request in batch]

    def _sample_tokens(
        self, states_PLH: torch.Tensor, mask_PL: torch.Tensor, decoding: DecodingConfig, seeds: Sequence[int]
    ) -> list[Candidate]:
        """Sample `decoding.n` candidates per prompt token by token; return them ordered by prompt.

        Args:
            states_PLH: encoder output.
            mask_PL: 1 for a token, 0 for padding.
            decoding: the sampling settings.
            seeds: one seed per prompt.
        """
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
        # The rows that are still in the batch: their row numbers, and whether each has finished.
        live = torch.arange(rows, device=self.device)
        finished = torch.zeros(rows, dtype=torch.bool, device=self.device)
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
                ending |= torch.tensor([self._text_before_stop(ids, decoding) is not None for ids in texts], device=self.device)
            for row in live[ending & ~finished].tolist():
                length_R[row] = step + 1
            finished |= ending
            if bool(finished.all()):
                break
            if finished.sum() >= _FINISHED_SHARE * len(finished):
                keep = (~finished).nonzero()[:, 0]
                cache.batch_select_indices(keep)
                states_RLH, mask_RL, live, token, finished = states_RLH[keep], mask_RL[keep], live[keep], token[keep], finished[keep]
            inputs = token[:, None]
        return [
            self._candidate(ids, logprobs, length, decoding)
            for ids, logprobs, length in zip(drawn_RT.tolist(), logprob_RT.tolist(), length_R, strict=True)
        ]

    def _beam_search(
        self, states_PLH: torch.Tensor, mask_PL: torch.Tensor, decoding: DecodingConfig, seeds: Sequence[int]
    ) -> list[Candidate]:
        """Return the best `decoding.n` candidates per prompt from transformers' beam search, ordered by prompt; `seeds` are unused."""
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
        # Beam search returns ranking scores, so the log-probabilities need another forward step with the finished candidates.
        states_RLH, mask_RL = (each.repeat_interleave(decoding.n, dim=0) for each in (states_PLH, mask_PL))
        parts = zip(*(each.split(_LOGPROB_ROWS) for each in (states_RLH, mask_RL, drawn_RT)), strict=True)
        logprob_RT = torch.cat([self._token_logprobs(*part) for part in parts])
        ends = set(self.ends.tolist())
        candidates = []
        for ids, values in zip(drawn_RT.tolist(), logprob_RT.tolist(), strict=True):
            lengths = range(1, len(ids) + 1)
            length = next(
                (each for each in lengths if ids[each - 1] in ends or self._text_before_stop(ids[:each], decoding) is not None), 0
            )
            candidates.append(self._candidate(ids[: decoding.max_tokens], values, length, decoding))
        return candidates

    def _token_logprobs(self, states_RLH: torch.Tensor, mask_RL: torch.Tensor, drawn_RT: torch.Tensor) -> torch.Tensor:
        """Return the log-probability of each token of finished candidates, [R, T]."""
        inputs = torch.cat([torch.tensor([self.prefix] * len(drawn_RT), device=self.device), drawn_RT[:, :-1]], dim=1)
        logits = self.model(encoder_outputs=(states_RLH,), attention_mask=mask_RL, decoder_input_ids=inputs).logits
        logits_RTV = logits[:, len(self.prefix) - 1 :].float()
        return logits_RTV.gather(2, drawn_RT[:, :, None])[:, :, 0] - logits_RTV.logsumexp(-1)

    def _text_before_stop(self, ids: Sequence[int], decoding: DecodingConfig) -> str | None:
        """Return the text before the first stop string, or None if it has none. The first `min_tokens` tokens are not searched."""
        if not decoding.stop or len(ids) <= decoding.min_tokens:
            return None
        text = self._text(ids)
        start = len(self._text(ids[: decoding.min_tokens]))
        found = [at for stop in decoding.stop if (at := text.find(stop, start)) >= 0]
        return text[: min(found)] if found else None

    def _text(self, ids: Sequence[int]) -> str:
        """Return the text of token ids without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _candidate(self, ids: Sequence[int], logprobs: Sequence[float], length: int, decoding: DecodingConfig) -> Candidate:
        """Return the candidate of the first `length` tokens; length 0 is a candidate that did not finish and has all tokens."""
        drawn = ids[: length or None]
        text = self._text_before_stop(drawn, decoding)
        text = self._text(drawn) if text is None else text
        return Candidate(
            response=(text if self._keep_reasoning else strip_reasoning(text)).strip(),
            decoding=decoding.name,
            tokens=len(drawn),
            finish_reason="stop" if length else "length",
            logprob=sum_logprobs(logprobs[: len(drawn)]),
        )


def choose_tokens(logits_RV: torch.Tensor, decoding: DecodingConfig, uniform_R: torch.Tensor) -> torch.Tensor:
    """Return one token per row, [R].

    At temperature 0 it is the most likely token. Otherwise the distribution is modified by temperature, then top_k, then top_p, and
    the token is the quantile `uniform_R` of it (inverse transform sampling).

    Args:
        logits_RV: logits of the next token.
        decoding: the sampling settings.
        uniform_R: random numbers in [0, 1).
    """
    if decoding.temperature == 0:
        return logits_RV.argmax(-1)
    logits, order = logits_RV / decoding.temperature, None
    if decoding.top_k:
        logits, order = logits.topk(min(decoding.top_k, logits.shape[-1]))
    mass = logits.softmax(-1)
    if decoding.top_p < 1 and order is None:
        mass, order = _most_likely(mass, decoding.top_p)
    # Cumulative sums in float64: in float32 the sum over a whole vocabulary loses the rarest tokens.
    mass = mass.cumsum(-1, dtype=torch.float64)
    last = torch.full_like(uniform_R, logits.shape[-1] - 1, dtype=torch.int64)[:, None]
    if decoding.top_p < 1:
        # Nucleus sampling: the smallest set of tokens whose probability mass reaches top_p.
        last = (mass < decoding.top_p).sum(-1, keepdim=True).minimum(last)
    position = torch.searchsorted(mass, uniform_R[:, None] * mass.gather(1, last), right=True).minimum(last)
    return (position if order is None else order.gather(1, position))[:, 0]


def _most_likely(mass_RV: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the highest probabilities in descending order and their tokens: at least as many as reach `top_p`, or all."""
    head, tokens = mass_RV.topk(min(_TOP_P_HEAD, mass_RV.shape[-1]))
    if bool((head.sum(-1) >= top_p).all()):
        return head, tokens
    return tuple(mass_RV.sort(descending=True))


def _fail(batch: Sequence[_Request], error: Exception) -> None:
    """Raise `error` in all calls of a batch."""
    for request in batch:
        if not request.answer.done():
            request.answer.set_exception(error)
