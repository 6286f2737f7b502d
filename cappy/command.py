"""Parts that all commands share: the application, the options of several commands, and the report that a command returns.

Imports no Ray, no torch and no storage.
"""

from __future__ import annotations

import inspect as python_inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console

app = typer.Typer(
    name="cappy",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="""Improve an LLM with a small scorer that picks the best of its answers (Cappy), on Ray.

The steps: [bold]plan[/bold] the cost, [bold]generate[/bold] a regression set, [bold]train[/bold] the scorer,
[bold]evaluate[/bold] it, [bold]adapt[/bold] it to tasks. [bold]answer[/bold] or [bold]score[/bold] a whole data set,
or [bold]serve[/bold] the best answers.
All verbs read one config. Each verb finds the output of the others below the workspace.
""",
    epilog="Start with: cappy doctor; then cappy generate demo, cappy adapt demo, cappy evaluate demo, cappy serve demo.",
)
# Texts of users can hold brackets, e.g. `data [v2]`, which are not markup.
out = Console(highlight=False, markup=False)


@dataclass
class OutputOptions:
    """The options that all commands have."""

    json: bool = False
    debug: bool = False


class Report(NamedTuple):
    """The outcome of a command."""

    result: dict[str, Any]
    """The value that `--json` prints."""
    show: Callable[..., object] = lambda console: None
    """Prints the result for people; takes the console."""
    failure: Exception | None = None
    """Raised after the result is printed."""


def command(group: typer.Typer = app, *, name: str | None = None, epilog: str | None = None) -> Callable[..., Any]:
    """Register a function that returns a `Report` as a command.

    The command has the options `--json` and `--debug` in addition: typer reads them from the signature that is set here.
    """

    def register(function: Callable[..., Report]) -> Callable[..., Report]:
        @wraps(function)
        def run(context: typer.Context, as_json: bool, debug: bool, **arguments: Any) -> None:
            options = context.find_root().ensure_object(OutputOptions)
            options.json, options.debug = as_json, debug
            report = function(**arguments)
            if as_json:
                print_json(report.result)
            else:
                report.show(out)
            if report.failure:
                raise report.failure

        own = python_inspect.signature(function, eval_str=True).parameters
        added = {"as_json": AsJson, "debug": Debug}
        kind = python_inspect.Parameter.KEYWORD_ONLY
        parameters = [
            python_inspect.Parameter("context", kind, annotation=typer.Context),
            *(parameter.replace(kind=kind) for parameter in own.values()),
            *(python_inspect.Parameter(option, kind, default=False, annotation=annotation) for option, annotation in added.items()),
        ]
        run.__signature__ = python_inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        group.command(name, epilog=epilog)(run)
        return function

    return register


AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on the last line of standard output.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]

ConfigFile = Annotated[
    str | None,
    typer.Argument(
        metavar="[CONFIG]", help="A YAML file, or the name of a file in cappy/configs/ (demo). The default is a config of defaults."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one setting, e.g. --set training.epochs=2. Repeatable.", show_default=False),
]
Address = Annotated[
    str | None,
    typer.Option("--address", metavar="URL", help="Run as a Ray job on the cluster with this dashboard, e.g. http://127.0.0.1:8265."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the files of an earlier run at the destination.")]


def print_json(value: dict[str, Any]) -> None:
    """Print the result as one JSON object on one line of standard output."""
    print(json.dumps(value, ensure_ascii=False), flush=True)
