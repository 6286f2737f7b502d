"""Boosted decoding of one request: sample the candidates, score them, select the choices. Imports neither Ray nor a web framework."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from cluster.config import Config, DecodingConfig, Fallback
from generation.labels import describe_metric
from serving import best_of_n, sampling_policy
from serving.backend import ApiError, Backend, Scored, merge_scored
from serving.candidate_log import CandidateLog, build_row
from serving.completions_api import SampleRequest, TextRequest, build_prompt
from serving.prometheus import Metrics
from serving.ranking import SelectedBy, Selector, select_choices
from serving.responses import Completion, Latency, build_completion, merge_completions
from serving.streaming import build_progress_chunk
from training.consensus import consensus_metric

_PAIRS_PER_CALL = 64
"""Pairs in one call of the scorer. A long list is spread over the replicas, and pairs of other requests are scored in between."""
OnProgress = Callable[[dict[str, Any]], None]
"""Receives the chunks that report the progress of a stream."""


class BoostedDecoding:
    """Answers requests: samples candidates, scores them, and selects the choices.

    Args:
        config: The settings of the server.
        backend: The LLM and the scorers.
        metrics: Counts the pools.
        fitted_scorers: Names of the scorers that are known to have a fitted selection, which decides whether the LLM computes
            log-probabilities. Answers of scorers update it.
        log: Logs the candidates; None logs nothing.
    """

    def __init__(
        self, config: Config, backend: Backend, metrics: Metrics, fitted_scorers: set[str], log: CandidateLog | None = None
    ) -> None:
        self._config, self._backend, self._metrics = config, backend, metrics
        self._fitted_scorers, self._log = fitted_scorers, log

    async def complete(
        self, request: SampleRequest, scorer: str | None, decodings: list[DecodingConfig], on_progress: OnProgress, *, early: bool
    ) -> Completion:
        """Return the answer to a request. The prompts of a text completion are sampled concurrently, each with its own pool.

        Args:
            request: The parsed request.
            scorer: Name of the scorer, None for the LLM alone.
            decodings: The decodings of each prompt.
            on_progress: Called during sampling if the request has `cappy.progress`.
            early: See `best_of_n.draw_pool`.
        """
        parts = request.split() if isinstance(request, TextRequest) else [request]
        tasks = [asyncio.ensure_future(self._complete_prompt(part, scorer, decodings, on_progress, early)) for part in parts]
        try:
            results = await asyncio.gather(*tasks)
            answer = merge_completions([part for part, _ in results])
            rows = [{"id": answer.id, "prompt": number, **row} for number, (_, row) in enumerate(results) if row]
            if self._log and rows:
                self._log.add(rows)
            return answer
        finally:
            # If one prompt failed, or the client disconnected, the other answers are not needed.
            for task in tasks:
                task.cancel()

    async def _complete_prompt(
        self, request: SampleRequest, scorer: str | None, decodings: list[DecodingConfig], on_progress: OnProgress, early: bool
    ) -> tuple[Completion, dict[str, Any] | None]:
        """Sample and score the candidates of one prompt; return the answer with the best, and the row for the log, if it is logged."""
        config, backend = self._config, self._backend
        completion_id, created = uuid.uuid4().hex, int(time.time())
        prompt = build_prompt(request, config.sampler.prompt.system)
        instruction = sampling_policy.scorer_instruction(request, config)

        def report_progress(pool: best_of_n.Pool) -> None:
            on_progress(build_progress_chunk(request, pool.candidates, pool.scores, completion_id=completion_id, created=created))

        def score(responses: Sequence[str]) -> Awaitable[Scored]:
            assert scorer is not None
            return score_pairs(backend, scorer, [instruction] * len(responses), responses)

        if not sampling_policy.needs_scores(request, config):
            scorer = None
        logprobs = sampling_policy.needs_logprobs(request, config, scored=scorer is not None, fitted=scorer in self._fitted_scorers)
        pool = await best_of_n.draw_pool(
            decodings,
            lambda drawn, seeds, on_finished: backend.sample(prompt, drawn, seeds, logprobs, on_finished),
            score if scorer else None,
            seed=request.seed,
            n=request.n,
            stopping=sampling_policy.select_stopping_rule(request, config) if scorer else None,
            scorer_timeout_s=config.serving.scorer_timeout_s,
            early=early,
            on_progress=report_progress if request.cappy.progress else None,
        )
        self._metrics.observe_pool(pool)
        if scorer and pool.has_scores:
            (self._fitted_scorers.add if pool.selection else self._fitted_scorers.discard)(scorer)
        mode = sampling_policy.select_mode(request, config)
        fallback = None if mode == "consensus" else _fallback(request, pool, config)
        if fallback:
            self._metrics.count_fallback(fallback)
        metric = consensus_metric(describe_metric(config.generate.label))
        selector = Selector(mode, metric, pool.selection, pool.logprob_weight)
        selected_by, ranking = await _rank(instruction, pool, selector, scorer, fallback)
        answer = build_completion(
            request,
            pool.candidates,
            pool.scores,
            ranking,
            prompt_tokens=pool.prompt_tokens,
            scorer=scorer,
            version=pool.version,
            latency=Latency(sampling_s=round(pool.sampling_s, 4), scoring_s=round(pool.scoring_s, 4)),
            completion_id=completion_id,
            created=created,
            fallback=fallback,
            selection=selected_by,
            cost=pool.cost,
            stopped=pool.stop_reason,
        )
        withheld = answer.cappy is not None and answer.cappy.abstained
        if withheld:
            self._metrics.count_abstention()
        if self._log is None or request.store is False:
            return answer, None
        return answer, build_row(
            instruction,
            pool.candidates,
            pool.scores,
            [] if withheld else select_choices(pool.candidates, ranking, request.n),
            created=created,
            models={"model": request.model, "llm": config.sampler.model, "scorer": scorer, "scorer_version": pool.version},
            selection=fallback or selected_by,
        )


async def _rank(
    instruction: str, pool: best_of_n.Pool, selector: Selector, scorer: str | None, fallback: Fallback | None
) -> tuple[SelectedBy | None, list[float]]:
    """Return the result of `Selector.rank` for a pool; a slow ranking runs in a thread."""

    def rank() -> tuple[SelectedBy | None, list[float]]:
        return selector.rank(instruction, pool.candidates, pool.scores, scored=scorer is not None, fallback=fallback)

    return await asyncio.to_thread(rank) if selector.is_slow or fallback == "consensus" else rank()


def _fallback(request: SampleRequest, pool: best_of_n.Pool, config: Config) -> Fallback | None:
    """Return the fallback that selects if the scorer failed before it scored any candidate, else None.

    Raises `ApiError` (503) if the scorer failed and the fallback is `none`.
    """
    if pool.scorer_error is None or pool.has_scores:
        return None
    fallback = sampling_policy.select_fallback(request, config)
    if fallback != "none":
        return fallback
    if isinstance(pool.scorer_error, ApiError):
        raise pool.scorer_error
    message = f"the scorer gave no answer within serving.scorer_timeout_s={config.serving.scorer_timeout_s:g}; retry"
    raise ApiError(message, 503, code="scorer_late")


async def score_pairs(backend: Backend, scorer: str, instructions: Sequence[str], responses: Sequence[str]) -> Scored:
    """Score pairs in concurrent calls of up to `_PAIRS_PER_CALL` each; see `merge_scored` for the result."""
    slices = [slice(start, start + _PAIRS_PER_CALL) for start in range(0, len(responses), _PAIRS_PER_CALL)]
    parts = await asyncio.gather(*(backend.score(scorer, instructions[part], responses[part]) for part in slices))
    return merge_scored(parts)
