"""Render PromptSource templates in a separate process, with limits on CPU time, memory and output. Standard library and Jinja2 only.

Templates are untrusted programs. Jinja's immutable sandbox keeps them from Python's internals. The limits of the process keep them from
using all time or memory: `serve` sets them and answers requests on its standard input. `promptsource.TemplateRenderer` starts it.

A missing column, a null, and an index outside a list are errors as soon as a template uses them. So they never become a part of a text.
"""

from __future__ import annotations

import datetime
import itertools
import json
import pickle
import random
import resource
import signal
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import IO, Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

SEPARATOR = "|||"
# Replaces a `|||` inside the text of a row while a template is rendered and split.
_PROTECTED = "\ue000pipes\ue001"
MAX_FRAME = 1 << 26
"""Bytes of the results of one row, at most."""
_MAX_DRAWS = 100_000
_PRINTABLE = (str, int, float, list, tuple, dict, set, frozenset, Decimal, datetime.date, datetime.time, datetime.timedelta)


class Limits(NamedTuple):
    """Limits of one rendering."""

    cpu_s: float = 2.0
    """CPU time, in seconds."""
    memory: int = 512 << 20
    """Memory of the process above its size at the start, in bytes."""
    text: int = 1_000_000
    """Characters of a rendered text."""


class Template(NamedTuple):
    """A named template; `answer_choices` is None if the answer is free text."""

    name: str
    jinja: str
    answer_choices: str | None


class Null:
    """A null of a row. A template can test for it, also with `default(..., true)`, but not print or compare it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def _fail(self, *_: Any) -> Any:
        raise TypeError(f"`{self._name}` is null")

    def __bool__(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return True if other is None or other is self else bool(self._fail())

    __str__ = __repr__ = __iter__ = __len__ = __hash__ = _fail  # type: ignore[assignment]


class _Missing(jinja2.StrictUndefined):
    """A missing column or item: any use but `is defined` and `default` is an error, also inside a list that is printed."""

    def __repr__(self) -> str:
        return str(self)


class _GuardItems(NodeTransformer):
    """Replace each subscript by an expression, such as `answer_choices[label]`, by a filter that refuses a negative index."""

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        constant = node.arg.node if isinstance(node.arg, nodes.Neg) else node.arg
        if isinstance(constant, nodes.Const | nodes.Slice):
            return node
        return nodes.Filter(node.node, "cappy_item", [node.arg], [], None, None, lineno=node.lineno)


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox with PromptSource's additions: `zip`, `choice`, `most_frequent` and others."""

    intercepted_binops = frozenset({"**"})

    def __init__(self, max_text: int) -> None:
        super().__init__(undefined=_Missing, finalize=_check_printable)
        self._max_text = max_text
        self._rng = random.Random()
        self.globals.pop("lipsum")
        self.globals.update(zip=zip, enumerate=enumerate, len=len, min=min, max=max)
        self.filters.update(choice=self._choice, most_frequent=_most_frequent, highlight=str, random=_refuse_random, cappy_item=self._item)
        self.tests["none"] = lambda value: value is None or isinstance(value, Null)

    def compile_guarded(self, text: str) -> jinja2.Template:
        """Return a compiled template in which a computed index is checked."""
        return self.from_string(_GuardItems().visit(self.parse(text)))

    def render(self, template: jinja2.Template, row: Mapping[str, Any], key: str) -> str:
        """Return the text that a template renders for a row; `key` seeds the `choice` filter. Exceptions of the template pass through."""
        self._rng = random.Random(key)
        pieces, length = [], 0
        for piece in template.generate(**row):
            pieces.append(piece)
            length += len(piece)
            if length > self._max_text:
                raise SecurityError(f"the text is longer than {self._max_text} characters")
        return "".join(pieces)

    def _choice(self, items: Sequence[Any]) -> Any:
        return self._rng.choice(list(itertools.islice(items, _MAX_DRAWS)))

    def _item(self, items: Any, index: Any) -> Any:
        if isinstance(items, str | list | tuple) and isinstance(index, int) and index < 0:
            raise SecurityError(f"the index {index} is negative: a label is outside its choices")
        return self.getitem(items, index)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        # One long operation of the C code would not stop for the time limit, but end the process.
        if abs(left) > 10_000 or abs(right) > 64:
            raise SecurityError(f"{left} ** {right} is too large")
        return super().call_binop(context, operator, left, right)


def _check_printable(value: Any) -> Any:
    """Return a value that a template prints. Raises `TypeError` for a value whose text is Python's notation of an object."""
    if isinstance(value, _PRINTABLE):
        return value
    if isinstance(value, Null | jinja2.Undefined):
        return str(value)
    raise TypeError(f"a {type(value).__name__} cannot be printed")


def _refuse_random(*_: Any) -> None:
    raise SecurityError("the `random` filter has no seed; use `choice`")


def _most_frequent(items: Sequence[Any]) -> list[Any] | None:
    """Return the most frequent items in order of first occurrence, or None for no items."""
    counts = Counter(items)
    highest = max(counts.values(), default=0)
    return [item for item, count in counts.items() if count == highest] or None


def guard_value(value: Any, name: str) -> Any:
    """Return a value of a row for a template: each null becomes `Null`, and each `|||` in a text is replaced."""
    if value is None or value != value:
        return Null(name)
    if isinstance(value, str):
        return value.replace(SEPARATOR, _PROTECTED)
    if isinstance(value, list | tuple):
        return [guard_value(each, name) for each in value]
    if isinstance(value, dict):
        return {key: guard_value(each, f"{name}.{key}") for key, each in value.items()}
    return value


def _restore(text: str) -> str:
    """Return the stripped text with each protected `|||` restored."""
    return text.replace(_PROTECTED, SEPARATOR).strip()


class _TimeLimit(Exception):
    """The CPU time of a rendering is used up."""


class Renderer:
    """Render the templates of one file, each for one row at a time, within the limits."""

    STOP_AFTER = 3
    """Renderings of a template in a row that reach the time limit before the template is stopped."""

    def __init__(self, templates: Sequence[Template], seed: int, limits: Limits) -> None:
        self._templates = templates
        self._seed = seed
        self._limits = limits
        self._sandbox = Sandbox(limits.text)
        self._compiled: dict[str, jinja2.Template | str] = {}
        self._timed_out: Counter[str] = Counter()
        signal.signal(signal.SIGPROF, self._stop)

    def _stop(self, *_: Any) -> None:
        raise _TimeLimit(f"more than {self._limits.cpu_s:g} s of CPU time")

    def render(self, number: int, row: Mapping[str, Any], example: str) -> dict[str, Any]:
        """Return `{"row": ...}`, `{"blank": True}` or `{"error": reason}` for template `number` and a guarded row."""
        template = self._templates[number]
        if self._timed_out[template.name] >= self.STOP_AFTER:
            return {"error": f"stopped, after {self.STOP_AFTER} rows in a row took more than {self._limits.cpu_s:g} s of CPU time"}
        # A call of C code that runs on after the signal ends with the process.
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + self._limits.cpu_s) + 1, resource.RLIM_INFINITY))
        try:
            signal.setitimer(signal.ITIMER_PROF, self._limits.cpu_s)
            try:
                result = self._render(template, row, f"{self._seed}:{template.name}:{example}")
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
        except _TimeLimit as error:
            self._timed_out[template.name] += 1
            return {"error": str(error)}
        except Exception as error:  # an expression can raise any exception, e.g. a ZeroDivisionError or a MemoryError
            result = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        self._timed_out[template.name] = 0
        return result

    def _render(self, template: Template, row: Mapping[str, Any], key: str) -> dict[str, Any]:
        answers = None
        if template.answer_choices is not None:
            rendered = self._sandbox.render(self._compile(template.answer_choices), row, key)
            answers = [_restore(text) for text in rendered.split(SEPARATOR)]
        guarded = Null("answer_choices") if answers is None else answers
        prompt, *targets = self._sandbox.render(self._compile(template.jinja), {**row, "answer_choices": guarded}, key).split(SEPARATOR)
        if not _restore(prompt):
            return {"blank": True}
        if not targets:
            raise ValueError(f"the template has no {SEPARATOR} between prompt and answer")
        references = [text for target in targets if (text := _restore(target))]
        if not references:
            raise ValueError("the answer is blank")
        kept = [text for text in answers if text] if answers is not None else None
        return {"row": {"instruction": _restore(prompt), "references": references, "answer_choices": kept or None}}

    def _compile(self, text: str) -> jinja2.Template:
        """Return the compiled template. Compiling runs constant expressions, so it happens within the limits."""
        if text not in self._compiled:
            try:
                self._compiled[text] = self._sandbox.compile_guarded(text)
            except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError) as error:
                self._compiled[text] = f"{type(error).__name__}: {error}"
        compiled = self._compiled[text]
        if isinstance(compiled, str):
            raise ValueError(f"the template does not compile: {compiled}")
        return compiled


def write_frame(stream: IO[bytes], data: bytes) -> None:
    """Write the length of some bytes and the bytes."""
    stream.write(struct.pack(">Q", len(data)) + data)


def _read_frames(stream: IO[bytes]) -> Iterator[Any]:
    """Yield the pickled requests of the reader's process, which is trusted, until it closes the stream."""
    while len(head := stream.read(8)) == 8:
        yield pickle.loads(stream.read(struct.unpack(">Q", head)[0]))


def serve(stdin: IO[bytes], stdout: IO[bytes]) -> None:
    """Set the limits of this process and answer requests until the input ends.

    The first request is `(templates, seed, limits)`; the answer is a frame. Each other one is `(template numbers, [(row, example),
    ...])` and gets a frame of JSON for each row: a list with the result of each template.
    """
    requests = _read_frames(stdin)
    templates, seed, limits = next(requests)
    renderer = Renderer(templates, seed, limits)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for kind, limit in ((resource.RLIMIT_AS, size + limits.memory), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)):
        resource.setrlimit(kind, (limit, limit))
    write_frame(stdout, b"ready")
    stdout.flush()
    flushed = time.monotonic()
    for numbers, rows in requests:
        for row, example in rows:
            try:
                guarded = {str(name): guard_value(value, str(name)) for name, value in row.items()}
                results = [renderer.render(number, guarded, example) for number in numbers]
                data = json.dumps(results).encode()
            except (MemoryError, RecursionError) as error:
                data = json.dumps([{"error": type(error).__name__}] * len(numbers)).encode()
            if len(data) > MAX_FRAME:
                data = json.dumps([{"error": f"the results of a row are larger than {MAX_FRAME >> 20} MiB"}] * len(numbers)).encode()
            write_frame(stdout, data)
            if time.monotonic() - flushed > 1:
                stdout.flush()
                flushed = time.monotonic()
        stdout.flush()


def main() -> None:
    """Serve on the standard streams of this process."""
    serve(sys.stdin.buffer, sys.stdout.buffer)


if __name__ == "__main__":
    main()
