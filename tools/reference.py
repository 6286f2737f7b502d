"""The reference pages of the documentation, generated from the code: settings, command line and Python API.

`tools/site_hooks.py` calls these functions when the site is built, so no generated page is committed and none can drift.
"""

from __future__ import annotations

import importlib
import json
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args, get_origin

import typer.main
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from cappy.cli import app
from cluster.config import Config, Section

PUBLIC_PACKAGE = "cappy"
"""The package whose `__all__` is the public Python API."""

_TYPES: dict[Any, str] = {int: "integer", float: "number", bool: "true or false", str: "text", type(None): "null"}
_BOUNDS = {"ge": "≥ {}", "gt": "> {}", "le": "≤ {}", "lt": "< {}", "min_length": "length ≥ {}", "max_length": "length ≤ {}"}


@dataclass(frozen=True)
class Group:
    """The settings of one section of the config tree."""

    path: str
    """Dotted path from the root; `[]` follows a list; empty for the root."""
    model: type[Section]
    kind: str
    """The value of `kind` that selects this section where several are possible, else empty."""

    @property
    def title(self) -> str:
        name = self.path or "Top level"
        return f"{name} (kind: {self.kind})" if self.kind else name

    @property
    def anchor(self) -> str:
        return re.sub(r"[^a-z0-9_]+", "-", self.title.lower()).strip("-")


def groups(model: type[Section] = Config, path: str = "", kind: str = "", seen: tuple[type[Section], ...] = ()) -> Iterator[Group]:
    """Yield every section of the tree, a parent before its children; a section used at several paths is yielded at each."""
    yield Group(path, model, kind)
    for name, field in model.model_fields.items():
        inner = _sections(field.annotation)
        below = f"{path}.{name}" if path else name
        for section, is_list in inner:
            if section in seen or section is model:
                continue
            named = _kind(section) if len(inner) > 1 else ""
            yield from groups(section, below + ("[]" if is_list else ""), named, (*seen, model))


def missing_docs() -> list[str]:
    """Return `Section.field` for each setting without a docstring, sorted."""
    models = {group.model for group in groups()}
    return sorted(f"{model.__name__}.{name}" for model in models for name, field in model.model_fields.items() if not field.description)


def settings_page() -> str:
    """Return the settings reference as Markdown: a table for each section."""
    every = list(groups())
    lines = [
        "# Settings",
        "",
        "Every setting of a config file. Generated from the code. `--set PATH=VALUE` changes one for a single run.",
        "`cappy config show my.yaml` prints the resolved values and their origin.",
        "",
    ]
    for group in every:
        lines += [f"## {group.title} {{ #{group.anchor} }}", "", _sentence(group.model.__doc__), ""]
        lines += ["| Setting | Type | Default | Range | Meaning |", "| --- | --- | --- | --- | --- |"]
        for name, field in group.model.model_fields.items():
            path = f"{group.path}.{name}" if group.path else name
            targets = [each for each in every if each.path in (path, f"{path}[]")]
            kind = ", ".join(f"[{each.kind or each.title}](#{each.anchor})" for each in targets) or f"{_type(field.annotation)}"
            anchor = f"{group.anchor}.{name}" if group.kind else path.replace("[]", "")
            cells = [
                f'<span id="{anchor}">`{name}`</span>',
                f"list of {kind}" if targets and targets[0].path.endswith("[]") else kind,
                _default(field),
                ", ".join(_bounds(field)),
                _sentence(field.description),
            ]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def cli_page() -> str:
    """Return the command-line reference as Markdown: every command with its arguments, options and example."""
    lines = ["# Command line", "", "Every command and option. Generated from the code; `cappy COMMAND --help` prints the same.", ""]
    root = typer.main.get_command(app)
    for names, command, context in _commands(root, ("cappy",), None):
        arguments = [param for param in command.params if param.param_type_name == "argument"]
        options = [param for param in command.params if param.param_type_name == "option" and not param.hidden]
        usage = [*names, *(["[OPTIONS]"] if options else []), *(_argument(param) for param in arguments)]
        if getattr(command, "commands", None):
            usage.append("COMMAND")
        lines += [f"{'#' * max(2, len(names))} {' '.join(names)}", "", "```text", " ".join(usage), "```", ""]
        lines += [_plain(command.help), ""]
        for title, params in (("Argument", arguments), ("Option", options)):
            if params:
                lines += [f"| {title} | Meaning |", "| --- | --- |"]
                for param in params:
                    usage_text, meaning = param.get_help_record(context)
                    name = _argument(param) if title == "Argument" else usage_text
                    lines.append(f"| `{name}` | {_plain(meaning)} |".replace("<int range>", "N"))
                lines.append("")
        if command.epilog:
            lines += [_example(command.epilog), ""]
    return "\n".join(lines)


def python_page() -> str:
    """Return the Python reference as Markdown for mkdocstrings: each name of `cappy.__all__` with signature and docstring."""
    lines = ["# Python API", "", "The public names. Generated from the code.", ""]
    for name, target in public_names():
        lines += [f"## {name}", "", f"::: {target}", "    options:", "      show_root_heading: false", "      heading_level: 3", ""]
    return "\n".join(lines)


def public_names() -> list[tuple[str, str]]:
    """Return (public name, dotted path of its definition) of the Python API."""
    package = importlib.import_module(PUBLIC_PACKAGE)
    names = []
    for name in package.__all__:
        value = getattr(package, name)
        names.append((f"{PUBLIC_PACKAGE}.{name}", f"{value.__module__}.{value.__qualname__}"))
    return names


# --- settings --------------------------------------------------------------------------------------------------------------------


def _sections(annotation: Any) -> list[tuple[type[Section], bool]]:
    """Return (section, whether it is in a list) for each section a type holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [(typing.cast("type[Section]", annotation), False)]
    is_list = get_origin(annotation) in (tuple, list)
    return [(section, is_list or inner) for each in get_args(annotation) for section, inner in _sections(each)]


def _kind(section: type[Section]) -> str:
    return str(get_args(section.model_fields["kind"].annotation)[0])


def _type(annotation: Any) -> str:
    """Return the name of a type for readers of YAML."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if annotation in _TYPES:
        return _TYPES[annotation]
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(each) for each in inner)
    if origin is typing.Annotated:
        return _type(inner[0])
    if origin in (tuple, list):
        return f"list of {_type(inner[0])}"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type):
        return annotation.__name__
    raise TypeError(f"no name for the type {annotation!r} of a setting; add it to {__name__}._type")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default_factory is not None or field.default is PydanticUndefined:
        return "see Meaning"
    if isinstance(field.default, BaseModel):
        return ""
    value = json.dumps(list(field.default) if isinstance(field.default, tuple) else field.default, ensure_ascii=False, default=str)
    return f"`{value}`"


def _bounds(field: FieldInfo) -> list[str]:
    """Return the limits of a value or of its length."""
    found = [text.format(getattr(limit, name)) for limit in field.metadata for name, text in _BOUNDS.items() if hasattr(limit, name)]
    patterns = [limit.pattern for limit in field.metadata if getattr(limit, "pattern", None)]
    return found + [f"`{getattr(pattern, 'pattern', pattern)}`" for pattern in patterns]


def _sentence(text: str | None) -> str:
    return " ".join((text or "").split())


# --- command line ----------------------------------------------------------------------------------------------------------------


def _commands(command: Any, names: tuple[str, ...], above: Any) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Yield (names, command, context) of a command and all below it."""
    context = command.context_class(command, info_name=names[-1], parent=above)
    yield names, command, context
    for name, inner in getattr(command, "commands", {}).items():
        if not inner.hidden:
            yield from _commands(inner, (*names, name), context)


def _argument(param: Any) -> str:
    name = (param.metavar or param.name.upper()).strip("[]")
    return name if param.required else f"[{name}]"


def _plain(text: str | None) -> str:
    """Return a help text without rich's markup, with its paragraphs, safe inside Markdown."""
    paragraphs = re.sub(r"\[/?(bold|italic|dim)\]", "", text or "").strip().split("\n\n")
    return (
        "\n\n".join(" ".join(each.split()) for each in paragraphs)
        .replace("<", "&lt;")
        .replace("[default", "\\[default")
        .replace("|", "\\|")
    )


def _example(epilog: str) -> str:
    """Return an epilog as Markdown; a single command in it becomes a code block."""
    label, _, command = epilog.partition(": ")
    if command.startswith(("cappy", "curl")) and "; then" not in command:
        return f"{label}:\n\n```bash\n{command}\n```"
    return _plain(epilog)
