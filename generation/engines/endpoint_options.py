"""The JSON body of a request to an endpoint, without the options that its server rejects. Pure: no requests, no Ray."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

from cluster.config import DecodingConfig, EndpointConfig
from cluster.config.sampler import RequestOption
from cluster.progress import log
from generation import prompts
from generation.engines.endpoint_errors import ErrorAnswer, rejects_option

# Options whose absence changes the candidates, and that the engine cannot replace.
_CHANGING = ("chat_template_kwargs", "min_tokens", "top_k", "top_p", "temperature")


class CompletionRequest(NamedTuple):
    """The parameters of one request: `n` candidates of a decoding."""

    prompt: list[prompts.Message] | str
    decoding: DecodingConfig
    n: int
    seed: int | None
    logprobs: bool


class RequestOptions:
    """The options that the server of an endpoint accepts. An option counts as accepted until an answer rejects it."""

    def __init__(self, config: EndpointConfig, template_kwargs: Mapping[str, Any]) -> None:
        self._name, self._template_kwargs = f"sampler.engine.base_url={config.base_url}", dict(template_kwargs)
        # Options that the server rejected, or that the config turns off.
        self._left_out: set[str] = set(config.omit) | (set() if config.logprobs else {"logprobs"})
        # Whether the server rejects `temperature` and `top_p` in one request.
        self._one_of_two = False

    def __contains__(self, option: str) -> bool:
        """Return whether requests may have an option."""
        return option not in self._left_out

    def leave_out(self, option: str, reason: str = "") -> None:
        """Leave an option out of all later requests. One log line names an option whose absence changes the candidates."""
        if option in self and option in _CHANGING:
            log(f"{self._name} rejects {option}, so no request has it and candidates get the server's default ({reason})")
        self._left_out.add(option)

    def leave_out_rejected(self, error: ErrorAnswer, body: Mapping[str, Any]) -> str | None:
        """Leave out the option that an error rejects; return its name, or None if the error rejects no option of the body."""
        rejected: list[str] = [
            name
            for name in get_args(RequestOption)
            if name in body and rejects_option(error, name, neutral=name in ("top_p", "temperature") and body[name] == 1)
        ]
        if not rejected:
            return None
        if {"temperature", "top_p"} <= set(rejected):
            self._one_of_two = True
            return "top_p"
        self.leave_out(rejected[0], f"{error.status} {error.message}")
        return rejected[0]

    def body(self, model: str, request: CompletionRequest) -> dict[str, Any]:
        """Return the JSON body of a request."""
        prompt, decoding, n, seed, logprobs = request
        options: dict[str, Any] = {"temperature": decoding.temperature, "top_p": decoding.top_p}
        if self._one_of_two:
            # An option with the value 1 has no effect.
            del options["temperature" if decoding.temperature == 1 and decoding.top_p < 1 else "top_p"]
        if n > 1:
            options["n"] = n
        if decoding.top_k:
            options["top_k"] = decoding.top_k
        if decoding.min_tokens:
            options["min_tokens"] = decoding.min_tokens
        if decoding.stop:
            options["stop"] = list(decoding.stop)
        if seed is not None:
            options["seed"] = seed
        if logprobs:
            options["logprobs"] = 1 if isinstance(prompt, str) else True
        if self._template_kwargs and not isinstance(prompt, str):
            options["chat_template_kwargs"] = self._template_kwargs
        return {
            "model": model,
            **({"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}),
            "max_tokens" if "max_tokens" in self else "max_completion_tokens": decoding.max_tokens,
            **{name: value for name, value in options.items() if name in self},
        }
