"""PromptSource templates: a `templates.yaml` and raw rows give one row per template and raw row. Imports no Ray.

A template is Jinja2 text: the prompt, `|||` and the correct answer (several answers are separated by more `|||`). An optional
`answer_choices` is another template, whose choices are separated by `|||`.

Templates are untrusted programs. `template_sandbox` renders them in a separate process, with limits on time, memory and output.
"""

from __future__ import annotations

import datetime
import json
import os
import pickle
import select
import struct
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from typing import Any

import yaml

from cluster import storage
from cluster.errors import CappyError, UsageError, first_line
from generation.sources.formats import Row
from generation.sources.row import DeadLetter, dead_letter
from generation.sources.template_sandbox import MAX_FRAME, Limits, Renderer, Template, write_frame

_BATCH_ROWS = 256
_BATCH_CHARACTERS = 1 << 20
_SILENCE_S = 300.0
"""A process that is silent for this time is ended, in seconds."""
_Result = dict[str, Any]
_ENDED: _Result = {"error": "it used too much memory or CPU time, so its process was ended"}
_STOPPED: _Result = {"error": f"stopped, after its process was ended for {Renderer.STOP_AFTER} rows in a row"}
_PLAIN = (str, int, float, bytes, list, tuple, dict, Decimal, datetime.date, datetime.time, datetime.timedelta)


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
    """Apply the templates of a file to raw rows, in a process that is started again after a template ended it."""

    def __init__(self, templates: Sequence[Template], seed: int, limits: Limits | None = None) -> None:
        """Prepare for `templates`; `seed` seeds the draws of the `choice` filter."""
        self.blank = 0
        """Renderings that were blank so far: such a template does not apply to the row."""
        self._templates = templates
        self._first_request = (list(templates), seed, limits or Limits())
        self._process: subprocess.Popen[bytes] | None = None
        self._ended_by: Counter[int] = Counter()
        self._finalizer: weakref.finalize[[subprocess.Popen[bytes]], TemplateRenderer] | None = None

    def render_rows(self, raws: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Row] | tuple[str, DeadLetter]]:
        """Yield `(location, row)` for each raw row and template that does not render blank, ordered by template name, or a dead letter.

        Args:
            raws: `(location, raw row)` pairs. A dead letter is passed on. The name of a template is appended to the location.
        """
        batch: list[tuple[str, Any]] = []
        characters = 0
        for location, raw in raws:
            batch.append((location, raw))
            characters += sum(len(value) for value in raw.values() if isinstance(value, str)) if isinstance(raw, Mapping) else 0
            if len(batch) >= _BATCH_ROWS or characters > _BATCH_CHARACTERS:
                yield from self._render_batch(batch)
                batch, characters = [], 0
        yield from self._render_batch(batch)

    def close(self) -> None:
        """End the process."""
        if self._finalizer is not None:
            self._finalizer()
        self._process = self._finalizer = None

    def _render_batch(self, batch: list[tuple[str, Any]]) -> Iterator[tuple[str, Row] | tuple[str, DeadLetter]]:
        rows = [(_plain(raw), example_text(raw)) for _, raw in batch if isinstance(raw, Mapping)]
        numbers = [number for number in range(len(self._templates)) if self._ended_by[number] < Renderer.STOP_AFTER]
        answers = self._ask(numbers, rows) if rows else []
        found = zip(rows, answers if answers is not None else (self._ask_one_by_one(row) for row in rows), strict=True)
        for location, raw in batch:
            if isinstance(raw, DeadLetter):
                yield location, raw
            elif not isinstance(raw, Mapping):
                yield location, dead_letter(location, f"the row is a {type(raw).__name__}; a template needs an object", raw)
            else:
                (_, example), results = next(found)
                for number, template in enumerate(self._templates):
                    result = results.get(number, _STOPPED)
                    row_location = f"{location}#{template.name}"
                    if "row" in result:
                        yield row_location, {**result["row"], "template": template.name, "example": example}
                    elif "blank" in result:
                        self.blank += 1
                    else:
                        yield row_location, dead_letter(row_location, f"template {template.name!r}: {result['error']}", raw)

    def _ask_one_by_one(self, row: tuple[dict[str, Any], str]) -> dict[int, _Result]:
        """Return the result of each template for one row.

        Each template has its own request, so that only a template that ends the process fails.
        """
        results = {}
        for number in range(len(self._templates)):
            if self._ended_by[number] < Renderer.STOP_AFTER:
                answer = self._ask([number], [row])
                self._ended_by[number] = 0 if answer else self._ended_by[number] + 1
                results[number] = answer[0][number] if answer else _ENDED
        return results

    def _ask(self, numbers: list[int], rows: list[tuple[dict[str, Any], str]]) -> list[dict[int, _Result]] | None:
        """Return the results of some templates for each row, by template number; None if the process ended or was silent."""
        process = self._started()
        try:
            self._send(process, (numbers, rows))
            return [dict(zip(numbers, json.loads(self._receive(process)), strict=True)) for _ in rows]
        except (OSError, EOFError, ValueError, TypeError, AttributeError, pickle.PicklingError):
            self.close()
            return None

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            # The process gets the modules of this one, but none of its variables: they can hold credentials.
            environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}
            command = [sys.executable, "-P", "-m", "generation.sources.template_sandbox"]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
            )
            self._finalizer = weakref.finalize(self, _end, self._process)
            try:
                self._send(self._process, self._first_request)
                self._receive(self._process)
            except (OSError, EOFError) as error:
                self.close()
                raise CappyError(f"the process that renders source.templates did not start: {first_line(error)}") from None
        return self._process

    def _send(self, process: subprocess.Popen[bytes], request: Any) -> None:
        assert process.stdin is not None
        write_frame(process.stdin, pickle.dumps(request))
        process.stdin.flush()

    def _receive(self, process: subprocess.Popen[bytes]) -> bytes:
        """Return the next frame. Raises `EOFError` if the process ended, was silent or sent too much."""
        (length,) = struct.unpack(">Q", self._read(process, 8))
        if length > MAX_FRAME:
            raise EOFError(f"a frame of {length} bytes")
        return self._read(process, length)

    def _read(self, process: subprocess.Popen[bytes], length: int) -> bytes:
        assert process.stdout is not None
        descriptor = process.stdout.fileno()
        data = bytearray()
        while len(data) < length:
            ready, _, _ = select.select([descriptor], [], [], _SILENCE_S)
            piece = os.read(descriptor, min(length - len(data), 1 << 20)) if ready else b""
            if not piece:
                raise EOFError("the process ended" if ready else f"the process was silent for {_SILENCE_S:g} s")
            data += piece
        return bytes(data)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that renders templates. It has no state to save."""
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        with suppress(OSError):
            if stream is not None:
                stream.close()


def _plain(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a raw row without the values that a template cannot print, e.g. images."""
    return {str(name): value for name, value in raw.items() if value is None or isinstance(value, _PLAIN)}


def example_text(raw: Mapping[str, Any]) -> str:
    """Return the text that identifies the underlying example of a raw row: its longest text, e.g. a passage with several questions.

    For a row without a text, return the row as JSON.
    """
    texts = [" ".join(value.split()) for value in raw.values() if isinstance(value, str) and value.strip()]
    return max(texts, key=lambda text: (len(text), text)) if texts else json.dumps(raw, sort_keys=True, default=str)
