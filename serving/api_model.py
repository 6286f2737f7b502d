"""The base of the request and response models. Imports neither Ray nor a web framework."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class ApiModel(BaseModel):
    """Base of the request and response models; the docstrings of their fields become descriptions in the OpenAPI schema."""

    model_config = ConfigDict(use_attribute_docstrings=True)


def make_model_optional(schema: dict[str, Any]) -> None:
    """Change the JSON schema of a request in place: its field `model` may be absent or null, and the server then sets it."""
    schema["required"].remove("model")
    name = schema["properties"]["model"]
    name["anyOf"] = [{"type": name.pop("type")}, {"type": "null"}]
