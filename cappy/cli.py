"""The `cappy` command: parse the arguments, load the config, run a verb, print its result.

Progress and errors go to standard error. Standard output has the result alone, always in UTF-8; with `--json` its last line is one
JSON object. Exit codes: 0 done, 1 failed, 2 invalid command, setting or input, 130 interrupted, 143 stopped by SIGTERM.

Imports no Ray, no torch and no storage: each verb imports its own module when it runs.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from io import TextIOWrapper
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from cappy.command import Address, ConfigFile, Debug, OutputOptions, Overrides, Overwrite, Report, app, command, out, print_json
from cluster.errors import CappyError, describe_disk_error, find_disk_error, typed_first_line
from cluster.progress import log

if TYPE_CHECKING:
    from cluster.config import Config

__all__ = ["app", "main"]

config_app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")
app.add_typer(config_app, name="config", help="Print a resolved config with the origin of each value, or the schema of config files.")


@command(epilog="Example: cappy plan demo --set plan.rates_from=s3://bucket/small/dataset --set 'plan.gpus=[8,64]'")
def plan(config: ConfigFile = None, set_: Overrides = None) -> Report:
    """Estimate size and cost of generate: rows, pairs, tokens, storage, GPU-hours, dollars, and the assumptions.

    Reads and counts the instructions. Loads no LLM and writes nothing.
    """
    from cappy import display
    from cluster.config import load
    from generation.plan import run_plan

    result = run_plan(load(config, set_ or ()))
    return Report(result, partial(display.show_plan, result))


@command(epilog="Example: cappy generate demo --set workspace=s3://bucket/demo")
def generate(config: ConfigFile = None, set_: Overrides = None, address: Address = None, overwrite: Overwrite = False) -> Report:
    """Sample responses from the LLM, label them with Rouge-L, publish the regression set.

    Run the same command again to resume an interrupted run.
    """
    return _run("generate", config, set_, address, overwrite)


@command(epilog="Example: cappy extend s3://bucket/demo/dataset s3://bucket/demo/more --set sampler.model=other/llm")
def extend(
    src: Annotated[str, typer.Argument(help="A regression set: a folder or s3:// prefix that generate or extend published.")],
    dst: Annotated[str, typer.Argument(help="The destination of the extended set.")],
    set_: Overrides = None,
    address: Address = None,
    overwrite: Overwrite = False,
) -> Report:
    """Add rows, decodings or another LLM to a published set, as a new set. Only the missing candidates are sampled.

    The config is that of SRC; change it with --set source.path=..., sampler.decodings=[...] or sampler.model=... All rows of SRC, their
    splits and their candidates are kept, also of decodings that the config does not have. SRC is not changed.

    Run the same command again to resume an interrupted run.
    """
    from generation.extend import read_config

    return _run("extend", read_config(src, dst, set_ or ()), None, address, overwrite, src=src, dst=dst)


@command(epilog="Example: cappy combine s3://bucket/first/dataset s3://bucket/second/dataset s3://bucket/both")
def combine(
    sources: Annotated[list[str], typer.Argument(metavar="SRC...", help="Two or more regression sets with different rows.")],
    destination: Annotated[str, typer.Argument(metavar="DST", help="The destination of the combined set.")],
    overwrite: Overwrite = False,
) -> Report:
    """Make one set of several published sets, by reference: the new set names their files and copies none.

    The sets need different rows and the same label metric. All verbs read the combined set as any other; push copies its files into one
    folder. If a set that it refers to changes, readers refuse it, and the same command with --overwrite combines the sets again.
    """
    from cappy import display, verbs

    result = verbs.combine(sources, destination, overwrite=overwrite)
    return Report(result, partial(display.show_summary, "dataset", result))


@command(epilog="Example: cappy annotate s3://bucket/demo/dataset s3://bucket/demo/chrf --set generate.label.metric=chrf")
def annotate(
    src: Annotated[str, typer.Argument(help="A regression set: a folder or s3:// prefix that generate published; or a log of serve.")],
    dst: Annotated[str, typer.Argument(help="The destination of the set with the new labels.")],
    feedback: Annotated[
        str | None,
        typer.Option("--feedback", metavar="FILE", help="SRC is a log of serve: rows with the id of an answer and a reference or rating."),
    ] = None,
    set_: Overrides = None,
    address: Address = None,
    overwrite: Overwrite = False,
) -> Report:
    """Label a published set by another metric, without sampling: --set generate.label.metric=... and generate.label.mode=...

    Metrics: rouge_l (the default), token_f1, chrf, exact_match, or a function package.module:function. References, choices and
    mismatched candidates keep their labels.

    With --feedback, make a set from the candidates that serve logged (serving.log_candidates). With a reference, all candidates of an
    answer are labelled by the metric. A rating, in [0, 1], is the label of the answer's choice.
    """
    return _run("annotate", None, set_, address, overwrite, src=src, dst=dst, **({"feedback": feedback} if feedback else {}))


@command(epilog="Example: cappy train demo --set training.epochs=2 --set scorer.encoder=/models/roberta-large")
def train(config: ConfigFile = None, set_: Overrides = None, address: Address = None, overwrite: Overwrite = False) -> Report:
    """Train the scorer on the regression set by regression on the labels.

    The published folder loads with AutoModelForSequenceClassification.from_pretrained. Run the same command again to resume an
    interrupted run from its last checkpoint.
    """
    return _run("train", config, set_, address, overwrite)


@command(epilog="Example: cappy adapt demo --set adapt.pairs=4096")
def adapt(config: ConfigFile = None, set_: Overrides = None, address: Address = None, overwrite: Overwrite = False) -> Report:
    """Fine-tune a published scorer for each task of the source. Publish each result that is better by cross-validation on train rows.

    Samples with the frozen LLM first if no set is published. Run the same command again to resume with the unfinished tasks.
    """
    report = _run("adapt", config, set_, address, overwrite)
    return report._replace(failure=typer.Exit(1)) if report.result["failed"] else report


@command(epilog="Example: cappy evaluate demo --json | tail -1 | jq .gain")
def evaluate(
    config: ConfigFile = None,
    set_: Overrides = None,
    suite: Annotated[
        str | None,
        typer.Option(
            "--suite", metavar="NAME", help="Run a suite instead: bigbench, promptsource, questions, or a YAML file with `suite:`."
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="FOLDER", help="Read the rows of the suite from these files instead of its source.")
    ] = None,
    address: Address = None,
    overwrite: Overwrite = False,
) -> Report:
    """Compare the scorer's choice with greedy decoding, sampling, self-scores and the oracle on the validation rows.

    Without a scorer in the workspace, cappy-minilm is compared. With evaluation.adapted=true, each task has its scorer of adapt.
    Writes results.json, rows.parquet and report.html. A suite does the same over many tasks; run the command again to resume it.
    """
    from cappy import verbs

    config, overrides = verbs.suite_config(config, suite, data, set_ or ())
    return _run("evaluate", config, overrides, address, overwrite)


@command(epilog="Example: cappy compare runs/a/evaluation runs/b/evaluation --method scorer")
def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="A folder or s3:// prefix that evaluate published.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another one, with rows of the same set.")],
    method: Annotated[
        list[str] | None,
        typer.Option("--method", help="Compare this method. Repeatable. The default is all common methods.", show_default=False),
    ] = None,
) -> Report:
    """Compare two evaluations on their common rows: paired differences B - A with intervals, on average and for each task."""
    from cappy import display_suites, verbs

    result = verbs.compare(first, second, methods=method or ())
    return Report(result, partial(display_suites.show_compare, result))


@command(
    epilog="Example: cappy answer --set source.kind=files --set source.path='s3://bucket/prompts/*.jsonl' --set workspace=s3://bucket/run"
)
def answer(config: ConfigFile = None, set_: Overrides = None, address: Address = None, overwrite: Overwrite = False) -> Report:
    """Answer a whole data set: sample candidates of each instruction, score them, publish the best as Parquet.

    Rows need an instruction only: `instruction`, `prompt`, `question`, a chat, or another source.format. References are optional, and
    the other columns of a row are kept. Rows with `answer_choices` are classified by the scorer, without the LLM.

    The scorer is scorer_path, else the scorer of the workspace, else cappy-minilm. The selection is that of serve: serving.selection,
    serving.fallback, serving.adaptive. Set answer.min_score to abstain, and answer.keep_candidates to keep all candidates.

    Writes to {workspace}/answers. Run the same command again to resume an interrupted run. sampler.engine.max_cost limits the dollars.
    """
    return _run("answer", config, set_, address, overwrite)


@command(epilog="Example: cappy score 's3://bucket/pairs/*.parquet' s3://bucket/good --keep-above 0.5 --top-per-instruction 1")
def score(
    src: Annotated[str, typer.Argument(help="Files with pairs, a glob, a folder, or a published folder; local or s3://.")],
    dst: Annotated[str, typer.Argument(help="The destination: an empty folder or s3:// prefix.")],
    scorer: Annotated[
        str | None,
        typer.Option(
            "--scorer",
            metavar="SCORER",
            help="A folder, s3:// prefix or name. The default is the scorer of the workspace, else cappy-minilm.",
        ),
    ] = None,
    keep_above: Annotated[
        float | None, typer.Option("--keep-above", metavar="X", help="Publish only rows with a score of at least X.")
    ] = None,
    top_per_instruction: Annotated[
        int | None, typer.Option("--top-per-instruction", metavar="N", min=1, help="Publish only the N best rows of each instruction.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="COLUMN", help="The column with the prompt. The default finds it by its name.")
    ] = None,
    response: Annotated[
        str | None, typer.Option("--response", metavar="COLUMN", help="The column with the response. The default finds it by its name.")
    ] = None,
    set_: Overrides = None,
    address: Address = None,
    overwrite: Overwrite = False,
) -> Report:
    """Score given pairs of an instruction and a response: to filter training data, or to rank logs.

    Reads Parquet, JSON lines, CSV and Arrow files with instruction and response, prompt and completion, question and answer, or similar
    columns. Of a chat, the last assistant turn is the response. SRC can be a published set, answers, scores or an export.

    Publishes Parquet files at DST with the columns of the rows, id, score in [0, 1], and logit, the raw output of the scorer. Export
    the folder with: cappy export DST OUT --as dpo. Run the same command again to resume an interrupted run.
    """
    from cappy import verbs

    given = verbs.score_settings(scorer, keep_above, top_per_instruction, prompt, response)
    overrides = [f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in given.items()]
    return _run("score", None, [*(set_ or ()), *overrides], address, overwrite, src=src, dst=dst)


@command(epilog="Then: curl http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json' -d '{...}'")
def serve(
    config: ConfigFile = None,
    set_: Overrides = None,
    new_key: Annotated[
        str | None,
        typer.Option("--new-key", metavar="NAME", help="Make an API key, print it and its entry for serving.api_keys, and exit."),
    ] = None,
    export: Annotated[
        str | None,
        typer.Option("--export", metavar="FILE", help="Write a config file for `serve deploy` or KubeRay's RayService, and exit."),
    ] = None,
    address: Address = None,
) -> Report:
    """Serve the best of several answers behind an OpenAI-compatible endpoint until interrupted.

    With --address the server runs on the head node of the cluster, at serving.host there, until `ray job stop`.
    """
    if export is not None:
        from cluster.config import load
        from serving.serve_config import export_serve_config

        return Report(export_serve_config(load(config, set_ or ()), export))
    if new_key is not None:
        from serving import api_keys

        key, sha256 = api_keys.create_key()

        def show(console: Console) -> None:
            print(f"key, shown only once: {key}")
            print(f"for the config:       serving: {{api_keys: [{{name: {json.dumps(new_key)}, sha256: {sha256}}}]}}")

        return Report({"name": new_key, "key": key, "sha256": sha256}, show)
    return _run("serve", config, set_, address, False)


@command(epilog="Example: cappy inspect s3://bucket/demo/dataset --samples 3")
def inspect(
    uri: Annotated[str, typer.Argument(help="A folder or s3:// prefix that a verb published.")],
    samples: Annotated[int, typer.Option("--samples", min=0, max=100, help="Rows of a regression set to show.")] = 2,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Check every file against its SHA-256.")] = True,
) -> Report:
    """Show the content of a published folder, and check its files against their checksums."""
    from cappy import display
    from cappy.inspection import run_inspect

    result = run_inspect(uri, samples=samples, verify=verify)
    problems = result["problems"]
    failure = CappyError(f"{uri}: {len(problems)} file(s) are damaged, first: {problems[0]}; copy or make it again") if problems else None
    return Report(result, partial(display.show_inspection, result), failure)


@command(name="list", epilog="Example: cappy list s3://bucket/demo")
def list_(uri: Annotated[str, typer.Argument(help="A folder or s3:// prefix.")]) -> Report:
    """List the published folders at and below a folder or prefix, and the runs that did not finish.

    Shows the kind of each folder, its rows, its size and the time it was made. `cappy inspect` shows one of them.
    """
    from cappy import display_listing, listing

    entries = listing.list_published(uri)
    return Report({"uri": uri, "entries": entries}, partial(display_listing.show_list, entries))


@command(epilog="Example: cappy push runs/demo/dataset s3://bucket/demo/dataset")
def push(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A published folder or s3:// prefix.")],
    destination: Annotated[str, typer.Argument(metavar="DST", help="An empty folder, an s3:// prefix or an hf:// repository.")],
    pairs: Annotated[
        bool, typer.Option("--pairs", help="Publish the pairs of a regression set as a plain table, one row for each pair.")
    ] = False,
) -> Report:
    """Copy a published folder to another place. Each file is checked against its SHA-256, and the manifest is written last.

    Run the same command again to resume an interrupted copy. On the Hugging Face hub (hf://datasets/OWNER/NAME, or hf://OWNER/NAME for a
    scorer) a push is one commit. A new repository is private. The token is read from HF_TOKEN or from hf auth login.
    """
    from cappy import display, verbs

    result = verbs.push(source, destination, pairs=pairs)
    return Report(result, partial(display.show_copy, result))


@command(epilog="Example: cappy pull s3://bucket/demo/scorer")
def pull(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A published folder, s3:// prefix, or hf:// repository with @REVISION and /PATH if needed.")
    ],
    destination: Annotated[
        str | None, typer.Argument(metavar="[DST]", help="A folder on this machine. The default is the last part of SRC.")
    ] = None,
) -> Report:
    """Copy a published folder to this machine, checked as by push. The manifest records the commit of a copy from the hub."""
    from cappy import display, verbs

    result = verbs.pull(source, destination)
    return Report(result, partial(display.show_copy, result))


@command(epilog="Example: cappy export runs/demo/dataset runs/demo/dpo --as dpo --margin 0.2")
def export(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A regression set, pairs, answers or scores: a published folder or prefix.")],
    destination: Annotated[str, typer.Argument(metavar="DST", help="An empty folder or s3:// prefix.")],
    form: Annotated[
        str, typer.Option("--as", metavar="FORMAT", help="sft, dpo, reward, kto (for TRL), chat (for OpenAI), pairs, or ranking.")
    ],
    by: Annotated[
        str | None,
        typer.Option("--by", metavar="COLUMN", help="The number that ranks the responses. The default is label of a set, else score."),
    ] = None,
    per_instruction: Annotated[
        int | None,
        typer.Option("--per-instruction", metavar="N", help="Most rows for an instruction. The default is 1 for sft, chat, dpo, reward."),
    ] = None,
    margin: Annotated[
        float | None, typer.Option("--margin", help="dpo, reward, kto, ranking: smallest difference between better and worse responses.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option("--threshold", help="sft, chat: smallest value of a response. kto: of a desirable one (0.5).")
    ] = None,
    candidates: Annotated[
        list[str] | None,
        typer.Option(
            "--source",
            help="Use candidates of this source: sampled, reference, choice, mismatched. Repeatable. "
            "The default is sampled; all for pairs and ranking.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[str, typer.Option("--prompt", metavar="COLUMN", help="The column with the prompt.")] = "instruction",
    response: Annotated[str, typer.Option("--response", metavar="COLUMN", help="The column with the response.")] = "response",
    messages: Annotated[bool, typer.Option("--messages", help="Write prompts and responses as chat messages, for chat models.")] = False,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="A system message (chat, or with --messages).")] = None,
    duplicates: Annotated[
        bool, typer.Option("--duplicates", help="pairs: publish all pairs of a set with all columns, as push --pairs.")
    ] = False,
    overwrite: Overwrite = False,
) -> Report:
    """Write training data for other libraries: fine-tuning, preferences, chats or rankings, from a set, answers or scores.

    Picks the best responses of each instruction (sft, chat), or better and worse ones (dpo, reward, kto). Leaves out repeats and
    responses with contradicting values, and counts them. Writes data/SPLIT/part-*, a card and a manifest.
    """
    from cappy import display, verbs

    result = verbs.export(
        source,
        destination,
        form,
        by=by,
        per_instruction=per_instruction,
        margin=margin,
        threshold=threshold,
        sources=candidates or (),
        prompt=prompt,
        response=response,
        messages=messages,
        system=system,
        duplicates=duplicates,
        overwrite=overwrite,
    )
    return Report(result, partial(display.show_copy if duplicates else display.show_export, result))


@command(name="run", epilog="Example: cappy run pipeline.yaml --set training.epochs=2 --redo train")
def run_(
    pipeline: Annotated[
        str, typer.Argument(metavar="PIPELINE", help="A YAML file with steps, or the name of a file in cappy/pipelines/ (demo).")
    ],
    set_: Overrides = None,
    redo: Annotated[
        list[str] | None,
        typer.Option(
            "--redo",
            metavar="STEP",
            help="Allow to delete the output of this step, and outputs made from it, if its settings changed. Repeatable.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the steps and the estimated costs. Change nothing.")] = False,
    address: Address = None,
) -> Report:
    """Run several verbs as one plan: generate, annotate, train, adapt, evaluate, answer, score, export, in the order of their data.

    A step is kept while its settings and the versions of its inputs are those of its published output. Run the same command again to
    resume. A changed step and all steps that read its output are made again, after --redo allows it. --set changes all steps.
    """
    from cappy import display_pipeline, verbs

    result = verbs.run(pipeline, settings=set_ or (), redo=redo or (), dry_run=dry_run, address=address)
    return Report(result, partial(display_pipeline.show_pipeline, result))


@command()
def doctor(
    config: ConfigFile = None,
    set_: Overrides = None,
    models: Annotated[bool, typer.Option("--models/--no-models", help="Also fetch and convert the embedded models.")] = True,
) -> Report:
    """Check this machine: versions, imports, the engine, storage and models. Each failure is printed with its fix."""
    from cappy import display
    from cappy.doctor import run_doctor
    from cluster.config import load

    findings = run_doctor(load(config, set_ or ()), models=models)
    ok = all(finding.ok for finding in findings)
    result = {"checks": [vars(finding) for finding in findings], "ok": ok}
    return Report(result, partial(display.show_findings, findings), None if ok else typer.Exit(1))


@command(config_app, name="show", epilog="Example: cappy config show demo --set training.epochs=2")
def config_show(config: ConfigFile = None, set_: Overrides = None) -> Report:
    """Print the resolved config. A comment gives the origin of each value: default, FILE:LINE or --set.

    Hashes of API keys and passwords in URLs are redacted.
    """
    from cluster.config import origin

    tree, origins = origin.show(config, set_ or ())
    return Report({"config": tree, "origins": origins}, lambda console: print(origin.to_yaml(tree, origins), end=""))


@config_app.command("schema", epilog="Example: cappy config schema > schema.json")
def config_schema(
    context: typer.Context,
    pipeline: Annotated[bool, typer.Option("--pipeline", help="Print the schema of the files of cappy run.")] = False,
    debug: Debug = False,
) -> None:
    """Print the JSON Schema of config files, or of pipeline files.

    Editors complete and check a YAML file whose first line is: # yaml-language-server: $schema=schema.json
    """
    context.find_root().ensure_object(OutputOptions).debug = debug
    if pipeline:
        from cappy.pipeline_file import schema_text as text
    else:
        from cluster.config.schema import text
    print(text(), end="")


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    if version:
        from cluster.runtime import code_version

        out.print(f"cappy-ray {code_version()}")
        raise typer.Exit


# The kind of artifact that each verb publishes; it selects the table of its summary.
_KINDS = {
    "generate": "dataset",
    "extend": "dataset",
    "annotate": "dataset",
    "train": "scorer",
    "adapt": "adapted",
    "evaluate": "evaluation",
    "answer": "answers",
    "score": "scores",
}


def _run(
    verb: str, config: str | Config | None, overrides: list[str] | None, address: str | None, overwrite: bool, **places: str
) -> Report:
    from cappy import display, jobs
    from cluster.config import load

    result = jobs.run_verb(verb, load(config, overrides or ()), overwrite=overwrite, address=address, **places)
    return Report(result, partial(display.show_summary, _KINDS[verb], result) if verb in _KINDS else lambda console: None)


def main() -> None:
    """Run the command line. Turn an expected error into one line and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # An argument or a file name can hold bytes that are not UTF-8, as lone surrogates. Write these as escapes.
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    options = OutputOptions()
    try:
        app(obj=options)
    except CappyError as error:
        _fail(str(error), error.exit_code, error, options)
    except KeyboardInterrupt:
        _fail("interrupted; run the same command again to resume", 130, None, options)
    except Exception as error:
        if options.debug:
            raise
        if full := find_disk_error(error):
            _fail(describe_disk_error(full, str(full.filename or "a file")), 1, error, options)
        _fail(f"{typed_first_line(error)} (a bug, or a fault of the machine; --debug shows the traceback)", 1, error, options)


def _fail(message: str, code: int, error: BaseException | None, options: OutputOptions) -> None:
    if options.debug and error is not None:
        raise error
    log(f"error: {message}")
    if options.json:
        print_json({"error": message, "exit_code": code})
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of an engine or of Ray can still be running. They must not delay the exit.
    os._exit(code)


if __name__ == "__main__":
    main()
