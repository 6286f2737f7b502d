"""The `cappy` command: parse, load the config, submit, show the result.

Progress and errors go to standard error; standard output has the result alone, and with `--json` its last line is one JSON
object. Exit codes: 0 done, 1 failed, 2 the command or a setting cannot work as given, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from cappy import jobs
from cluster import config as configuration
from cluster.errors import CappyError, UsageError, typed_first_line
from cluster.progress import log

app = typer.Typer(
    name="cappy",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="""Lift an LLM with a small scorer that picks the best of its answers (Cappy), on Ray.

The road: [bold]plan[/bold] what it will cost, [bold]generate[/bold] a regression set, [bold]train[/bold] the scorer,
[bold]evaluate[/bold] it, [bold]adapt[/bold] it to tasks, [bold]serve[/bold] boosted answers.
All verbs read one config; each finds the others' output below its workspace.
""",
    epilog="Start with: cappy doctor; then cappy generate demo, cappy train demo, cappy evaluate demo, cappy serve demo.",
)
out = Console(highlight=False)

ConfigFile = Annotated[
    str | None,
    typer.Argument(metavar="[CONFIG]", help="A YAML file, or the name of one in cappy/configs/ (demo). Without one the defaults are used."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change one setting, e.g. --set training.epochs=2; may be repeated.", show_default=False
    ),
]
Address = Annotated[
    str | None,
    typer.Option("--address", metavar="URL", help="Run as a Ray job on the cluster with this dashboard, e.g. http://127.0.0.1:8265."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on the last line of standard output.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what the destination holds.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


@app.command(epilog="Example: cappy plan demo --set plan.rates_from=s3://bucket/small/dataset --set 'plan.gpus=[8,64]'")
def plan(config: ConfigFile = None, set_: Overrides = None, as_json: AsJson = False, debug: Debug = False) -> None:
    """Tell what generate would make and cost: rows, pairs, tokens, storage, GPU-hours, dollars, and what is assumed.

    Reads and counts the instructions; loads no LLM and writes nothing.
    """
    from cappy import display
    from generation import plan as planning

    result = planning.run_plan(configuration.load(config, set_ or ()))
    if not as_json:
        display.show_plan(result, out)
    _finish(result, as_json)


@app.command(epilog="Example: cappy generate demo --set workspace=s3://bucket/demo")
def generate(
    config: ConfigFile = None,
    set_: Overrides = None,
    address: Address = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Sample responses from the LLM, label them with Rouge-L, publish the regression set.

    Interrupted, the same command goes on where it was.
    """
    _show("generate", _run("generate", config, set_, address, overwrite), as_json)


@app.command(epilog="Example: cappy annotate s3://bucket/demo/dataset s3://bucket/demo/chrf --set generate.label.metric=chrf")
def annotate(
    src: Annotated[str, typer.Argument(help="A regression set: a folder or s3:// prefix that generate published.")],
    dst: Annotated[str, typer.Argument(help="Where the set with the new labels goes.")],
    set_: Overrides = None,
    address: Address = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Label a published set anew, without sampling again, by --set generate.label.metric=... and generate.label.mode=...

    Metrics: rouge_l (the default), token_f1, chrf, exact_match. References, choices and mismatched candidates keep their labels.
    """
    config = configuration.load(None, set_ or ())
    _show("annotate", jobs.run_verb("annotate", config, overwrite=overwrite, address=address, src=src, dst=dst), as_json)


@app.command(epilog="Example: cappy train demo --set training.epochs=2 --set scorer.encoder=/models/roberta-large")
def train(
    config: ConfigFile = None,
    set_: Overrides = None,
    address: Address = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train the scorer on the regression set by regression on the labels.

    The published folder loads with AutoModelForSequenceClassification.from_pretrained. Interrupted, the same command goes on
    from the last checkpoint.
    """
    _show("train", _run("train", config, set_, address, overwrite), as_json)


@app.command(epilog="Example: cappy adapt adapt --set adapt.base=runs/demo/scorer --set adapt.method=lora")
def adapt(
    config: ConfigFile = None,
    set_: Overrides = None,
    address: Address = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Fit a published scorer to each task of the source, many at once; publish those that beat it on the task's validation rows.

    Samples with the frozen LLM first where no set is there yet. Interrupted, the same command goes on with the tasks that are
    not done.
    """
    result = _run("adapt", config, set_, address, overwrite)
    _show("adapt", result, as_json)
    if result["failed"]:
        raise typer.Exit(1)


@app.command(epilog="Example: cappy evaluate demo --json | tail -1 | jq .gain")
def evaluate(
    config: ConfigFile = None,
    set_: Overrides = None,
    address: Address = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compare the scorer's picks with greedy, sampling, self-scores and the oracle on the validation rows.

    Writes results.json, rows.parquet and report.html.
    """
    _show("evaluate", _run("evaluate", config, set_, address, overwrite), as_json)


@app.command(epilog="Then: curl http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json' -d '{...}'")
def serve(
    config: ConfigFile = None,
    set_: Overrides = None,
    new_key: Annotated[
        str | None, typer.Option("--new-key", metavar="NAME", help="Make an API key, print it and its entry for serving.api_keys, and end.")
    ] = None,
    export: Annotated[
        str | None,
        typer.Option("--export", metavar="FILE", help="Write a config file for `serve deploy` or KubeRay's RayService, and end."),
    ] = None,
    address: Address = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Serve boosted answers behind an OpenAI-compatible endpoint until interrupted.

    With --address it serves on the cluster's head, at serving.host there, until `ray job stop`.
    """
    if export is not None:
        from serving import serve_config as exporting

        _finish(exporting.export_serve_config(configuration.load(config, set_ or ()), export), as_json)
        return
    if new_key is not None:
        from serving.api_keys import create_key as make

        key, sha256 = make()
        if not as_json:
            print(f"key, shown this once: {key}")
            print(f"for the config:       serving: {{api_keys: [{{name: {json.dumps(new_key)}, sha256: {sha256}}}]}}")
        _finish({"name": new_key, "key": key, "sha256": sha256}, as_json)
        return
    _show("serve", _run("serve", config, set_, address, False), as_json)


@app.command(epilog="Example: cappy inspect s3://bucket/demo/dataset --samples 3")
def inspect(
    uri: Annotated[str, typer.Argument(help="A folder or s3:// prefix that generate, train or evaluate published.")],
    samples: Annotated[int, typer.Option("--samples", min=0, max=100, help="Rows of a regression set to show.")] = 2,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Check every file against its SHA-256.")] = True,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what a published folder holds, and check its files against their checksums."""
    from cappy import display, inspection

    result = inspection.run_inspect(uri, samples=samples, verify=verify)
    if not as_json:
        display.show_inspection(result, out)
    _finish(result, as_json)
    if result["problems"]:
        raise CappyError(f"{uri}: {len(result['problems'])} file(s) are damaged, first: {result['problems'][0]}; copy or make it again")


@app.command(epilog="Example: cappy push runs/demo/dataset s3://bucket/demo/dataset")
def push(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A published folder or s3:// prefix.")],
    destination: Annotated[str, typer.Argument(metavar="DST", help="An empty folder or s3:// prefix.")],
    pairs: Annotated[bool, typer.Option("--pairs", help="Publish a regression set's pairs as a plain table, a row a pair.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Copy what was published to another place, each file checked against its SHA-256, the manifest last.

    Interrupted, the same command goes on where it was.
    """
    if pairs:
        from generation.export_pairs import export_pairs as copy
    else:
        from cluster.copying import copy_folder as copy
    _show_copy(copy(source, destination), as_json)


@app.command(epilog="Example: cappy pull s3://bucket/demo/scorer")
def pull(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A published folder or s3:// prefix.")],
    destination: Annotated[str | None, typer.Argument(metavar="[DST]", help="A folder here; without one SRC's last part.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Copy what was published to this machine, checked as push does."""
    from cluster import copying, storage

    target = destination or source.rstrip("/").rsplit("/", 1)[-1]
    if storage.is_s3(target):
        raise UsageError(f"DST={target} is not on this machine; copy between stores with `cappy push {source} {target}`")
    _show_copy(copying.copy_folder(source, target), as_json)


@app.command()
def doctor(
    config: ConfigFile = None,
    set_: Overrides = None,
    models: Annotated[bool, typer.Option("--models/--no-models", help="Also fetch and convert the embedded models.")] = True,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check this machine: versions, imports, the engine, storage and models; say what to do about each failure."""
    from cappy import doctor as examination

    findings = examination.run_doctor(configuration.load(config, set_ or ()), models=models)
    if not as_json:
        examination.show(findings, out)
    _finish({"checks": [vars(finding) for finding in findings], "ok": all(finding.ok for finding in findings)}, as_json)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


config_app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")
app.add_typer(config_app, name="config", help="Print a resolved config with the origin of each value, or the schema of config files.")


@config_app.command("show", epilog="Example: cappy config show demo --set training.epochs=2")
def config_show(config: ConfigFile = None, set_: Overrides = None, as_json: AsJson = False, debug: Debug = False) -> None:
    """Print the resolved config. A comment gives the origin of each value: default, FILE:LINE or --set.

    Hashes of API keys and passwords in URLs are redacted.
    """
    from cluster.config import origin as config_origin

    tree, origins = config_origin.show(config, set_ or ())
    if not as_json:
        print(config_origin.to_yaml(tree, origins), end="")
    _finish({"config": tree, "origins": origins}, as_json)


@config_app.command("schema", epilog="Example: cappy config schema > schema.json")
def config_schema(debug: Debug = False) -> None:
    """Print the JSON Schema of config files.

    Editors complete and check a YAML file whose first line is: # yaml-language-server: $schema=schema.json
    """
    from cluster.config.schema import text

    print(text(), end="")


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    if version:
        from cluster.runtime import code_version

        out.print(f"cappy-ray {code_version()}")
        raise typer.Exit


# What each verb makes.
_KINDS = {"generate": "dataset", "annotate": "dataset", "train": "scorer", "adapt": "adapted", "evaluate": "evaluation"}


def _run(verb: str, config: str | None, overrides: list[str] | None, address: str | None, overwrite: bool) -> dict[str, Any]:
    loaded = configuration.load(config, overrides or ())
    return jobs.run_verb(verb, loaded, overwrite=overwrite, address=address)


def _show(verb: str, result: dict[str, Any], as_json: bool) -> None:
    """Print a verb's result for people, unless a program asked."""
    if not as_json and verb != "serve":
        from cappy import display

        display.show_summary(_KINDS[verb], result, out)
    _finish(result, as_json)


def _show_copy(result: dict[str, Any], as_json: bool) -> None:
    if not as_json:
        state = (
            f"{result['copied_files']} of {result['files']} files copied, {result['copied_bytes'] / 1e6:,.1f} MB at "
            f"{result['mb_per_second']:,.0f} MB/s"
            if result["copied_files"]
            else f"all {result['files']} files are already there"
        )
        out.print(f"{result['kind']} {result['uri']}: {state}")
    _finish(result, as_json)


def _finish(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, ensure_ascii=False), flush=True)


def main() -> None:
    """Run the command line; turn an operator's error into one line and an exit code."""
    debug = "--debug" in sys.argv
    try:
        app()
    except CappyError as error:
        _fail(str(error), error.exit_code, error, debug)
    except KeyboardInterrupt:
        _fail("interrupted; the same command goes on where this one was", 130, None, debug)
    except Exception as error:
        if debug:
            raise
        _fail(f"{typed_first_line(error)} (this is a bug, or a fault of the machine; --debug shows where)", 1, error, debug)


def _fail(message: str, code: int, error: BaseException | None, debug: bool) -> None:
    if debug and error is not None:
        raise error
    log(f"error: {message}")
    if "--json" in sys.argv:
        print(json.dumps({"error": message, "exit_code": code}, ensure_ascii=False), flush=True)
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of an engine or of Ray that are still winding down must not hold a finished command.
    os._exit(code)


if __name__ == "__main__":
    main()
