"""A client for a running server: send a chat request from Python, print the answer. Uses HTTP only; imports no Ray and no torch."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from cluster.errors import CappyError


def request_body(messages: Sequence[Mapping[str, str]], candidates: int, model: str) -> dict[str, Any]:
    """Return the body of a request for one answer out of `candidates`, with every candidate in the response."""
    return {"model": model, "messages": list(messages), "cappy": {"candidates": candidates, "return_candidates": True}}


def ask(
    url: str,
    messages: Sequence[Mapping[str, str]],
    candidates: int = 8,
    model: str = "cappy",
    timeout_s: float = 300.0,
    key: str | None = None,
) -> dict[str, Any]:
    """Send a chat request; return the server's answer, an OpenAI chat completion with the candidates under `cappy`.

    Args:
        url: the server's URL, e.g. http://127.0.0.1:8000.
        messages: the conversation, each with `role` and `content`.
        candidates: number of candidates to sample.
        model: name of a model that the server lists at `/v1/models`.
        timeout_s: timeout of the request, in seconds.
        key: an API key, if the server needs one.

    Raises `CappyError` if the server cannot be reached, does not answer in time or refuses the request.
    """
    try:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        response = httpx.post(_endpoint(url), json=request_body(messages, candidates, model), headers=headers, timeout=timeout_s)
    except httpx.TimeoutException:
        raise CappyError(f"{url} did not answer within timeout_s={timeout_s:g}; use fewer candidates or a longer timeout") from None
    except httpx.HTTPError as error:
        raise CappyError(f"{url} cannot be reached ({error}); start a server with `cappy serve`") from None
    if response.status_code != 200:
        raise CappyError(f"{url} answered {response.status_code}: {_error_message(response)}")
    answer: dict[str, Any] = response.json()
    return answer


def curl_command(url: str, body: Mapping[str, Any], *, key: bool = False) -> str:
    """Return a shell command that sends `body`; with `key` it reads an API key from the environment variable CAPPY_API_KEY."""
    data = shlex.quote(json.dumps(body, ensure_ascii=False))
    authorization = ' -H "Authorization: Bearer $CAPPY_API_KEY"' if key else ""
    return f"curl -s {_endpoint(url)} -H 'Content-Type: application/json'{authorization} -d {data}"


def print_answer(answer: Mapping[str, Any], console: Console) -> None:
    """Print the candidates of an answer with their scores, best first; the returned candidates are marked."""
    cappy = answer.get("cappy")
    if not cappy:
        for choice in answer["choices"]:
            console.print(choice["message"]["content"], markup=False)
        return
    table = Table("", "score", "log-prob", "tokens", "decoding", "response", title="Candidates, best first", title_justify="left")
    for name in ("score", "log-prob", "tokens"):
        column = next(each for each in table.columns if each.header == name)
        column.justify = "right"
    for candidate in cappy["candidates"]:
        score = candidate["score"]
        table.add_row(
            "*" if candidate["chosen"] else "",
            "-" if score is None else f"{score:.3f}",
            "-" if candidate["logprob"] is None else f"{candidate['logprob']:.1f}",
            str(candidate["tokens"]),
            candidate["decoding"],
            _one_line(candidate["response"]),
            style="bold green" if candidate["chosen"] else None,
        )
    console.print(table)
    latency = cappy["latency"]
    console.print(
        f"* returned. {len(cappy['candidates'])} candidates, {cappy['sampled_tokens']} tokens: "
        f"sampled in {latency['sampling_s']:.2f} s, scored in {latency['scoring_s']:.2f} s",
        markup=False,
    )


def _endpoint(url: str) -> str:
    return f"{url.rstrip('/').removesuffix('/v1')}/v1/chat/completions"


def _one_line(text: str) -> Any:
    """Return a response as one line of text that rich does not parse as markup."""
    from rich.text import Text

    return Text(" ".join(text.split()) or "(empty)", overflow="ellipsis", no_wrap=True)


def _error_message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200]
