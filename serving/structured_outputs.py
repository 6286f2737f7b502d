"""The field `structured_outputs` of a request: a form that the LLM's engine enforces while it samples. Pure."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from serving.api_model import ApiModel

MAX_CHARS = 16_384
"""Limit of the whole field as JSON: the engine compiles it to an automaton, which takes time and memory."""
_KINDS = ("json", "regex", "choice", "grammar", "json_object")


class StructuredOutputs(ApiModel):
    """Exactly one constraint, named as in vLLM's server."""

    model_config = ConfigDict(strict=True, extra="forbid")
    json_schema: dict[str, Any] | str | None = Field(None, alias="json")
    """A JSON schema, as an object or as text."""
    regex: Annotated[str, Field(min_length=1)] | None = None
    """A regular expression for the whole text."""
    choice: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=256, fail_fast=True)] | None = None
    """Texts, of which a candidate is one."""
    grammar: Annotated[str, Field(min_length=1)] | None = None
    """A context-free grammar in EBNF."""
    json_object: Literal[True] | None = None
    """Any JSON object."""
    disable_any_whitespace: bool = False
    """Whether JSON has no optional white space."""

    @model_validator(mode="after")
    def _check_one_constraint(self) -> StructuredOutputs:
        named = [name for name in _KINDS if name in self.to_engine()]
        if len(named) != 1:
            raise ValueError(f"give exactly one of {', '.join(_KINDS)}; {' and '.join(named) or 'none'} was given")
        if (chars := len(json.dumps(self.to_engine()))) > MAX_CHARS:
            raise ValueError(f"{chars:,} characters as JSON are above the limit of {MAX_CHARS:,}; send a smaller constraint")
        return self

    def to_engine(self) -> dict[str, Any]:
        """Return the arguments of vLLM's `StructuredOutputsParams`."""
        return self.model_dump(by_alias=True, exclude_defaults=True)
