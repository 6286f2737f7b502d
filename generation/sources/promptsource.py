"""PromptSource templates: a `templates.yaml` and raw rows give one row per template and raw row. Imports no Ray.

A template is Jinja2 text: the prompt, `|||` and the correct answer (several answers are separated by more `|||`). An optional
`answer_choices` is another template, whose choices are separated by `|||`.

Templates are untrusted programs. They run in Jinja's immutable sandbox with tighter limits: loop steps and calls are counted over
the whole rendering, and the length of texts is bounded.
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
from cluster.errors import UsageError, first_line
from generation.sources.formats import Row
from generation.sources.row import DeadLetter, dead_letter

MAX_STEPS = 100_000
"""Loop steps plus calls of one rendering, at most."""
MAX_TEXT = 1_000_000
"""Characters of a rendered template or of an intermediate text, at most."""

_SEPARATOR = "|||"
# Replaces a `|||` inside the text of a row while a template is rendered and split.
_PROTECTED = "\ue000pipes\ue001"
# Methods and filters that make a text of any length from a number.
_UNBOUNDED_METHODS = frozenset({"format", "format_map", "center", "ljust", "rjust", "zfill", "expandtabs"})
_UNBOUNDED_FILTERS = ("center", "format", "indent", "batch", "slice", "wordwrap", "xmlattr", "pprint")


@dataclass(frozen=True)
class Template:
    """A named template; `answer_choices` is None if the answer is free text."""

    name: str
    jinja: str
    answer_choices: str | None


class _Loader(yaml.SafeLoader):
    """A safe YAML loader that reads the two tags of PromptSource as plain mappings and rejects all other tags."""


def _mapping(loader: yaml.SafeLoader, node: yaml.Node) -> dict[Any, Any]:
    if not isinstance(node, yaml.MappingNode):
        raise yaml.constructor.ConstructorError(None, None, f"{node.tag} must be a mapping", node.start_mark)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("!Template", _mapping)
_Loader.add_constructor("!TemplateMetadata", _mapping)


def load_templates(uri: str) -> tuple[str | None, list[Template]]:
    """Return the name of the dataset and the templates of a file, ordered by name.

    The name includes the subset; it is None if the file does not give it. Raises `UsageError` if the file cannot be read or has no
    template.
    """
    try:
        tree = yaml.load(storage.read_bytes(uri), _Loader)
    except OSError as error:
        raise UsageError(f"source.templates={uri} cannot be read: {first_line(error)}; check the path and its permissions") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        position = f" at line {mark.line + 1}" if mark else ""
        raise UsageError(f"source.templates={uri} is not a YAML file of templates{position}: {getattr(error, 'problem', error)}") from None
    bodies = tree.get("templates") if isinstance(tree, dict) else None
    if not isinstance(bodies, dict) or not bodies:
        raise UsageError(f"source.templates={uri} has no `templates`; give the templates.yaml of a PromptSource dataset")
    templates = []
    for key, body in bodies.items():
        if not isinstance(body, dict) or not isinstance(body.get("jinja"), str):
            raise UsageError(f"source.templates={uri}: template {key} has no text in `jinja`; fix or remove it")
        choices = body.get("answer_choices")
        templates.append(Template(str(body.get("name") or key), body["jinja"], choices if isinstance(choices, str) else None))
    names = [str(tree[name]) for name in ("dataset", "subset") if tree.get(name)]
    return "_".join(names) or None, sorted(templates, key=lambda template: template.name)


class TemplateRenderer:
    """Compile the templates of a file once and apply them to raw rows."""

    def __init__(self, templates: Sequence[Template], seed: int) -> None:
        """Compile `templates`; `seed` seeds the draws of the `choice` filter."""
        self._environment = _Sandbox()
        self._seed = seed
        self._templates = [(each.name, self._compile(each.jinja), self._compile(each.answer_choices)) for each in templates]

    def _compile(self, text: str | None) -> jinja2.Template | str | None:
        """Return the compiled template, or its error as text: a broken template makes dead letters and does not stop the run."""
        try:
            return None if text is None else self._environment.from_string(text)
        except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError) as error:
            return f"{type(error).__name__}: {error}"

    def render_rows(self, location: str, raw: Any) -> Iterator[tuple[str, Row] | tuple[str, DeadLetter]]:
        """Yield `(location, row)` for each template that does not render blank, ordered by template name, or a dead letter.

        Args:
            location: location of the raw row; the name of a template is appended.
            raw: the raw row, or a dead letter, which is passed on.
        """
        if isinstance(raw, DeadLetter):
            yield location, raw
            return
        if not isinstance(raw, Mapping):
            yield location, dead_letter(location, f"the row is a {type(raw).__name__}; a template needs an object", raw)
            return
        protected = {str(name): value.replace(_SEPARATOR, _PROTECTED) if isinstance(value, str) else value for name, value in raw.items()}
        example = example_text(raw)
        for name, template, choices in self._templates:
            row_location = f"{location}#{name}"
            try:
                row = self._render(template, choices, protected, f"{self._seed}:{name}:{example}")
            except Exception as error:
                # The expressions of a template can raise any exception, e.g. a ZeroDivisionError.
                yield row_location, dead_letter(row_location, f"template {name!r}: {type(error).__name__}: {str(error)[:300]}", raw)
                continue
            if row is not None:
                yield row_location, {**row, "template": name, "example": example}

    def _render(
        self, template: jinja2.Template | str | None, choices: jinja2.Template | str | None, row: dict[str, Any], key: str
    ) -> Row | None:
        """Return the row of one template, or None if prompt or answer is blank; `key` seeds the draws of `choice`."""
        answers = None
        if choices is not None:
            answers = [_restore(text) for text in self._environment.render(choices, row, key).split(_SEPARATOR)]
        prompt, *targets = self._environment.render(template, {**row, "answer_choices": answers}, key).split(_SEPARATOR)
        if not targets and prompt.strip():
            raise ValueError(f"the template has no {_SEPARATOR} between prompt and answer")
        references = [text for target in targets if (text := _restore(target))]
        if not _restore(prompt) or not references:
            return None
        kept = [text for text in answers if text] if answers is not None else None
        return {"instruction": _restore(prompt), "references": references, "answer_choices": kept or None}


def example_text(raw: Mapping[str, Any]) -> str:
    """Return the text that identifies the underlying example of a raw row: its longest text, e.g. a passage with several questions.

    For a row without a text, return the row as JSON.
    """
    texts = [" ".join(value.split()) for value in raw.values() if isinstance(value, str) and value.strip()]
    return max(texts, key=lambda text: (len(text), text)) if texts else json.dumps(raw, sort_keys=True, default=str)


def _restore(text: str) -> str:
    """Return the stripped text with each protected `|||` restored."""
    return text.replace(_PROTECTED, _SEPARATOR).strip()


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox with PromptSource's additions (`zip`, `choice`, `most_frequent`) and limits on steps and sizes."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__()
        self._steps = 0
        self._rng = random.Random()
        self.globals.pop("lipsum")
        self.globals.update(zip=zip, enumerate=enumerate, len=len, min=min, max=max)
        for name in _UNBOUNDED_FILTERS:
            self.filters.pop(name)
        self.filters.update(
            choice=self._choice, most_frequent=_most_frequent, highlight=str, cappy_steps=self._count_steps, cappy_bounded=_check_size
        )
        for name in ("join", "replace"):
            self.filters[name] = _BOUNDED_FUNCTIONS[name]

    def render(self, template: jinja2.Template | str | None, row: Mapping[str, Any], key: str) -> str:
        """Return the text that a template renders for a row; `key` seeds the `choice` filter. Exceptions of the template pass through."""
        if not isinstance(template, jinja2.Template):
            raise ValueError(f"the template does not compile: {template}")
        self._steps = 0
        self._rng = random.Random(key)
        pieces, length = [], 0
        for piece in template.generate(**row):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_TEXT:
                raise SecurityError(f"the text is longer than {MAX_TEXT} characters")
        return "".join(pieces)

    def _generate(self, source: nodes.Template, *arguments: Any, **keywords: Any) -> str:
        # Each loop iterates over a counting wrapper, and the length of each assigned text is checked.
        for loop in list(source.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, "cappy_steps", [], [], None, None, lineno=loop.lineno)
        for block in list(source.find_all(nodes.AssignBlock)):
            block.filter = nodes.Filter(block.filter, "cappy_bounded", [], [], None, None, lineno=block.lineno)
        for assign in list(source.find_all(nodes.Assign)):
            assign.node = nodes.Filter(assign.node, "cappy_bounded", [], [], None, None, lineno=assign.lineno)
        return str(super()._generate(source, *arguments, **keywords))

    def _count_step(self) -> None:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise SecurityError(f"the template takes more than {MAX_STEPS} steps")

    def _count_steps(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._count_step()
            yield item

    def _choice(self, items: Sequence[Any]) -> Any:
        return self._rng.choice(list(itertools.islice(items, MAX_STEPS)))

    def call(self, context: Any, function: Any, /, *arguments: Any, **keywords: Any) -> Any:
        self._count_step()
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str) and getattr(function, "__name__", None) in _BOUNDED_FUNCTIONS:
            function, arguments = _BOUNDED_FUNCTIONS[function.__name__], (owner, *arguments)
            if function is _join:
                arguments = (arguments[1], owner)
        return _check_size(super().call(context, function, *arguments, **keywords))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            raise SecurityError("`%` on a text is not allowed; join texts with `~`")
        if operator == "**" and (abs(left) > 10_000 or abs(right) > 64):
            raise SecurityError(f"{left} ** {right} is too large")
        if operator == "*":
            for many, number in ((left, right), (right, left)):
                if isinstance(many, str | list | tuple) and isinstance(number, int) and len(many) * number > MAX_STEPS:
                    raise SecurityError(f"a text or list of length {len(many)} times {number} is too long")
                if isinstance(many, int) and abs(many) > 1 << 256:
                    raise SecurityError("a number is too large")
        return _check_size(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> None:
        """Return None, so that `str.format` is rejected as an unsafe attribute: its widths make texts of any length."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        unbounded = isinstance(obj, str) and attr in _UNBOUNDED_METHODS
        return not unbounded and super().is_safe_attribute(obj, attr, value)


def _check_size(value: Any) -> Any:
    if isinstance(value, str | list | tuple | dict) and len(value) > MAX_TEXT:
        raise SecurityError(f"a value is longer than {MAX_TEXT}")
    return value


def _most_frequent(items: Sequence[Any]) -> list[Any] | None:
    """Return the most frequent items in order of first occurrence, or None for no items."""
    counts = Counter(items)
    highest = max(counts.values(), default=0)
    return [item for item, count in counts.items() if count == highest] or None


def _join(items: Iterable[Any], between: str = "", attribute: str | int | None = None) -> str:
    """Join items like Jinja's `join` filter, with a limit on the length."""
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
    """Replace like `str.replace`, with a limit on the length."""
    text, old, new = str(text), str(old), str(new)
    if len(text) + text.count(old) * len(new) > MAX_TEXT:
        raise SecurityError(f"the replaced text is longer than {MAX_TEXT} characters")
    return text.replace(old, new, -1 if count is None else count)


_BOUNDED_FUNCTIONS: dict[str, Any] = {"join": _join, "replace": _replace}
