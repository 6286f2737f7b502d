"""The stream of an answer: its chunks in OpenAI's format, as server-sent events with keep-alives. Imports no Ray."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from generation.engines.contract import Candidate
from serving.backend import ApiError
from serving.completions_api import SampleRequest, TextRequest
from serving.responses import ChatCompletion, Completion, TextCompletion, build_scored_candidate

_LINE_SEPARATORS = str.maketrans({character: f"\\u{ord(character):04x}" for character in "\u0085\u2028\u2029"})
"""Line separators that JSON permits in a string. Clients that split a stream with `str.splitlines` would break the event there."""


def format_event(data: dict[str, Any]) -> str:
    """Return a server-sent event of one line."""
    return f"data: {json.dumps(data, ensure_ascii=False).translate(_LINE_SEPARATORS)}\n\n"


async def next_event(events: asyncio.Queue[str | None], keep_alive_s: float | None) -> str | None:
    """Return the next event of a stream, None after the last one, or a keep-alive comment if none arrives in time."""
    try:
        async with asyncio.timeout(keep_alive_s):
            return await events.get()
    except TimeoutError:
        return ": sampling\n\n"


async def stream_events(
    first: str | None,
    events: asyncio.Queue[str | None],
    task: asyncio.Task[Completion],
    request: SampleRequest,
    keep_alive_s: float,
    hide_error: Callable[[Exception], ApiError],
) -> AsyncIterator[str]:
    """Yield server-sent events: progress and keep-alives until the answer is complete, its chunks, and the end mark.

    An error is the last event of its stream; `hide_error` makes the client's error of an unexpected one. A client that disconnects
    cancels `task`.
    """
    try:
        event = first
        while event is not None:
            yield event
            event = await next_event(events, keep_alive_s)
        try:
            answer = task.result()
        except Exception as error:
            failure = error if isinstance(error, ApiError) else hide_error(error)
            yield format_event(failure.body)
            return
        for chunk in build_chunks(answer, usage=request.include_usage):
            yield format_event(chunk)
        yield "data: [DONE]\n\n"
    finally:
        task.cancel()


def build_progress_chunk(
    request: SampleRequest, candidates: Sequence[Candidate], scores: Sequence[float], *, completion_id: str, created: int
) -> dict[str, Any]:
    """Return a chunk that reports the candidates so far, in the order of sampling. It has no choices."""
    kind = TextCompletion.chunk if isinstance(request, TextRequest) else ChatCompletion.chunk
    common = {"id": f"{request.id_prefix}-{completion_id}", "object": kind, "created": created, "model": request.model}
    common |= {"usage": None} if request.include_usage else {}
    reported = [build_scored_candidate(candidate, score, False).model_dump() for candidate, score in zip(candidates, scores, strict=True)]
    return {**common, "choices": [], "cappy": {"progress": reported}}


def build_chunks(answer: Completion, *, usage: bool) -> list[dict[str, Any]]:
    """Return an answer as OpenAI's chunks: the choices in order, one word in each chunk.

    With `usage` one more chunk without choices follows. The last chunk carries `cappy`, if the answer has it.
    """
    common = {"id": answer.id, "object": answer.chunk, "created": answer.created, "model": answer.model}
    common |= {"usage": None} if usage else {}
    chunks: list[dict[str, Any]] = [{**common, "choices": [delta]} for choice in answer.choices for delta in choice.deltas()]
    if usage:
        chunks.append({**common, "choices": [], "usage": answer.usage.model_dump()})
    if answer.cappy is not None:
        chunks[-1]["cappy"] = answer.cappy.model_dump()
    return chunks
