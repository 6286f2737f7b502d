"""The base classes of the sections of the config."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

DEFAULT_SCORER = "cappy-minilm"
"""The scorer that ships with the package (`cluster.packed_scorer`)."""


class Section(BaseModel):
    """A part of the tree. It is immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ExtendedSection(Section):
    """A section that got settings after the first runs. They are left out of its dump while they have their default.

    So runs from before them keep their fingerprint.
    """

    added: ClassVar[tuple[str, ...]] = ()
    """The names of these settings."""

    @model_serializer(mode="wrap")
    def _without_added_defaults(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        tree: dict[str, Any] = write(self)
        fields = type(self).model_fields
        unset = {name for name in self.added if getattr(self, name) == fields[name].get_default(call_default_factory=True)}
        return {name: value for name, value in tree.items() if name not in unset}
