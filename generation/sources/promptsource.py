"""PromptSource templates over raw rows: `templates.yaml` in, one row in our own columns for each template and raw row out.

A template is Jinja2: the prompt, `|||`, the right answer (several with more `|||`), and perhaps `answer_choices`, itself a
template whose choices stand between `|||`. Templates are other people's programs, so they run in Jinja's immutable sandbox
with its limits made tight: loop steps and calls are counted over the whole render, and texts cannot grow without bound.
"""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import yaml
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cluster import storage
from cluster.errors import UsageError
from generation.sources.formats import Row
from generation.sources.row import DeadLetter, dead_letter

MAX_STEPS = 100_000
"""Loop steps and calls one render may take."""
MAX_TEXT = 1_000_000
"""Characters a rendered template, or a text on the way to it, may have."""

_SEPARATOR = "|||"
# Stands for a `|||` inside a row's own text while a template is rendered and cut.
_PROTECTED = "\ue000pipes\ue001"
# Methods and filters that make a text of any length out of a number.
_WIDENING = frozenset({"format", "format_map", "center", "ljust", "rjust", "zfill", "expandtabs"})
_WIDENING_FILTERS = ("center", "format", "indent", "batch", "slice", "wordwrap", "xmlattr", "pprint")


@dataclass(frozen=True)
class Template:
    """One named template; `answer_choices` is null where the answer is free text."""

    name: str
    jinja: str
    answer_choices: str | None


class _Loader(yaml.SafeLoader):
    """YAML with the two tags of PromptSource as plain mappings; any other tag is refused."""


def _mapping(loader: yaml.SafeLoader, node: yaml.Node) -> dict[Any, Any]:
    if not isinstance(node, yaml.MappingNode):
        raise yaml.constructor.ConstructorError(None, None, f"{node.tag} must be a mapping", node.start_mark)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("!Template", _mapping)
_Loader.add_constructor("!TemplateMetadata", _mapping)


def load_templates(uri: str) -> tuple[str | None, list[Template]]:
    """Return the dataset's name (subset included, null where it is not given) and the templates of a file, ordered by name.

    Raises `UsageError` where the file cannot be read or holds no template.
    """
    try:
        tree = yaml.load(storage.read_bytes(uri), _Loader)
    except OSError as error:
        raise UsageError(f"source.templates={uri} cannot be read: {str(error).splitlines()[0]}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise UsageError(f"source.templates={uri} is not YAML of templates{where}: {getattr(error, 'problem', error)}") from None
    bodies = tree.get("templates") if isinstance(tree, dict) else None
    if not isinstance(bodies, dict) or not bodies:
        raise UsageError(f"source.templates={uri} has no `templates`; give a templates.yaml as PromptSource has one for each dataset")
    templates = []
    for key, body in bodies.items():
        if not isinstance(body, dict) or not isinstance(body.get("jinja"), str):
            raise UsageError(f"source.templates={uri}: template {key} has no text `jinja`")
        choices = body.get("answer_choices")
        templates.append(Template(str(body.get("name") or key), body["jinja"], choices if isinstance(choices, str) else None))
    names = [str(tree[name]) for name in ("dataset", "subset") if tree.get(name)]
    return "_".join(names) or None, sorted(templates, key=lambda template: template.name)


class TemplateRenderer:
    """All templates of a file, compiled once; `rows` applies them to a raw row."""

    def __init__(self, templates: Sequence[Template], seed: int) -> None:
        self._environment = _Sandbox()
        self._seed = seed
        self._templates = [(each.name, self._compile(each.jinja), self._compile(each.answer_choices)) for each in templates]

    def _compile(self, text: str | None) -> jinja2.Template | str | None:
        """The template, or why it is none: a broken template is each row's dead letter, not the end of the run."""
        try:
            return None if text is None else self._environment.from_string(text)
        except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError) as error:
            return f"{type(error).__name__}: {error}"

    def render_rows(self, where: str, raw: Any) -> Iterator[tuple[str, Row] | tuple[str, DeadLetter]]:
        """Yield a row for each template that does not render blank, in order of their names."""
        if isinstance(raw, DeadLetter):
            yield where, raw
            return
        if not isinstance(raw, Mapping):
            yield where, dead_letter(where, f"the row is a {type(raw).__name__}; a template needs an object", raw)
            return
        protected = {str(name): value.replace(_SEPARATOR, _PROTECTED) if isinstance(value, str) else value for name, value in raw.items()}
        example = example_text(raw)
        for name, template, choices in self._templates:
            place = f"{where}#{name}"
            try:
                row = self._render(template, choices, protected, f"{self._seed}:{name}:{example}")
            except Exception as error:
                # What a template can raise is anything its expressions can, e.g. a ZeroDivisionError.
                yield place, dead_letter(place, f"template {name!r}: {type(error).__name__}: {str(error)[:300]}", raw)
                continue
            if row is not None:
                yield place, {**row, "template": name, "example": example}

    def _render(
        self, template: jinja2.Template | str | None, choices: jinja2.Template | str | None, row: dict[str, Any], key: str
    ) -> Row | None:
        answers = None
        if choices is not None:
            answers = [_restore(text) for text in self._environment.text(choices, row, key).split(_SEPARATOR)]
        prompt, *targets = self._environment.text(template, {**row, "answer_choices": answers}, key).split(_SEPARATOR)
        if not targets and prompt.strip():
            raise ValueError(f"no {_SEPARATOR} stands between prompt and answer")
        references = [text for target in targets if (text := _restore(target))]
        if not _restore(prompt) or not references:
            return None
        kept = [text for text in answers if text] if answers is not None else None
        return {"instruction": _restore(prompt), "references": references, "answer_choices": kept or None}


def example_text(raw: Mapping[str, Any]) -> str:
    """The text that stands for a raw row: its longest one, e.g. the passage that several questions share.

    A row without a text stands for itself.
    """
    texts = [" ".join(value.split()) for value in raw.values() if isinstance(value, str) and value.strip()]
    return max(texts, key=lambda text: (len(text), text)) if texts else json.dumps(raw, sort_keys=True, default=str)


def _restore(text: str) -> str:
    return text.replace(_PROTECTED, _SEPARATOR).strip()


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with what PromptSource adds to it (`zip`, `choice`, `most_frequent`), bounded in steps and size."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__()
        self._steps = 0
        self._draw = random.Random()
        self.globals.pop("lipsum")
        self.globals.update(zip=zip, enumerate=enumerate, len=len, min=min, max=max)
        for name in _WIDENING_FILTERS:
            self.filters.pop(name)
        self.filters.update(
            choice=self._choice, most_frequent=_most_frequent, highlight=str, cappy_steps=self._counted, cappy_bounded=_bounded
        )
        for name in ("join", "replace"):
            self.filters[name] = _LIMITED[name]

    def text(self, template: jinja2.Template | str | None, row: Mapping[str, Any], key: str) -> str:
        """Return a template's text for a row; `key` is behind each `choice`. Raises what the template raises."""
        if not isinstance(template, jinja2.Template):
            raise ValueError(f"the template does not compile: {template}")
        self._steps = 0
        self._draw = random.Random(key)
        pieces, length = [], 0
        for piece in template.generate(**row):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_TEXT:
                raise SecurityError(f"the text is longer than {MAX_TEXT} characters")
        return "".join(pieces)

    def _generate(self, source: nodes.Template, *arguments: Any, **keywords: Any) -> str:
        # Every loop runs over a counted iterable, and every text that is put together is measured.
        for loop in list(source.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, "cappy_steps", [], [], None, None, lineno=loop.lineno)
        for block in list(source.find_all(nodes.AssignBlock)):
            block.filter = nodes.Filter(block.filter, "cappy_bounded", [], [], None, None, lineno=block.lineno)
        for assign in list(source.find_all(nodes.Assign)):
            assign.node = nodes.Filter(assign.node, "cappy_bounded", [], [], None, None, lineno=assign.lineno)
        return str(super()._generate(source, *arguments, **keywords))

    def _step(self) -> None:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise SecurityError(f"the template takes more than {MAX_STEPS} steps")

    def _counted(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._step()
            yield item

    def _choice(self, items: Sequence[Any]) -> Any:
        return self._draw.choice(list(itertools.islice(items, MAX_STEPS)))

    def call(self, context: Any, function: Any, /, *arguments: Any, **keywords: Any) -> Any:
        self._step()
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str) and getattr(function, "__name__", None) in _LIMITED:
            function, arguments = _LIMITED[function.__name__], (owner, *arguments)
            if function is _join:
                arguments = (arguments[1], owner)
        return _bounded(super().call(context, function, *arguments, **keywords))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            raise SecurityError("`%` on a text is not allowed; join with `~`")
        if operator == "**" and (abs(left) > 10_000 or abs(right) > 64):
            raise SecurityError(f"{left} ** {right} is too large")
        if operator == "*":
            for many, number in ((left, right), (right, left)):
                if isinstance(many, str | list | tuple) and isinstance(number, int) and len(many) * number > MAX_STEPS:
                    raise SecurityError(f"a text or list of {len(many)} times {number} is too long")
                if isinstance(many, int) and abs(many) > 1 << 256:
                    raise SecurityError("a number is too large")
        return _bounded(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> None:
        """No `str.format`, whose widths make a text of any length: it is refused like any unsafe attribute."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        widens = isinstance(obj, str) and attr in _WIDENING
        return not widens and super().is_safe_attribute(obj, attr, value)


def _bounded(value: Any) -> Any:
    if isinstance(value, str | list | tuple | dict) and len(value) > MAX_TEXT:
        raise SecurityError(f"a value is longer than {MAX_TEXT}")
    return value


def _most_frequent(items: Sequence[Any]) -> list[Any] | None:
    """The items that occur most often, in their order; null where there are none."""
    counts = Counter(items)
    most = max(counts.values(), default=0)
    return [item for item, count in counts.items() if count == most] or None


def _join(items: Iterable[Any], between: str = "", attribute: str | int | None = None) -> str:
    pieces: list[str] = []
    length = 0
    for item in itertools.islice(items, MAX_STEPS):
        if attribute is not None:
            item = item.get(attribute, "") if isinstance(item, Mapping) else item[attribute]
        pieces.append(str(item))
        length += len(pieces[-1]) + len(between)
        if length > MAX_TEXT:
            raise SecurityError(f"the joined text is longer than {MAX_TEXT} characters")
    return between.join(pieces)


def _replace(text: str, old: str, new: str, count: int = -1) -> str:
    text, old, new = str(text), str(old), str(new)
    if len(text) + text.count(old) * len(new) > MAX_TEXT:
        raise SecurityError(f"the replaced text is longer than {MAX_TEXT} characters")
    return text.replace(old, new, -1 if count is None else count)


_LIMITED: dict[str, Any] = {"join": _join, "replace": _replace}
