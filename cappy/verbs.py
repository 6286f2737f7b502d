"""The verbs as Python functions, e.g. `cappy.train("demo")`. Imports Ray, torch and vLLM only when a verb needs them.

`config` is a `Config`, the path of a YAML file, the name of a file in `cappy/configs/`, or None for the defaults. `settings` change
single values on top of it, by dotted key: `{"training.epochs": 2}`.

All verbs raise `cluster.errors.UsageError` for invalid input and `cluster.errors.CappyError` for a failure. Both messages name the
setting, its value and the fix.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import Config, load
from cluster.errors import UsageError
from cluster.storage import is_hub, is_s3

if TYPE_CHECKING:
    from cappy.notebook import Prompt

ConfigLike = Config | str | Path | None


def plan(config: ConfigLike = None, *, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Estimate the size and the cost of `generate`: rows, pairs, tokens, bytes, GPU-hours and dollars.

    Reads and counts the instructions. Loads no LLM and writes nothing. `assumptions` in the result lists each assumed value
    with its origin.

    Example: `cappy.plan("t0", settings={"plan.gpus": [8, 64]})["dollars"]`
    """
    from generation.plan import run_plan

    return run_plan(load(config, settings or {}))


def generate(
    config: ConfigLike = None, *, settings: Mapping[str, Any] | None = None, overwrite: bool = False, address: str | None = None
) -> dict[str, Any]:
    """Sample responses from the LLM, label them, publish the regression set at `config.dataset_uri`, and return its summary.

    Call it again to resume an interrupted run. `overwrite` replaces a published set. `address` is the dashboard of a Ray cluster,
    e.g. `http://127.0.0.1:8265`: the verb then runs there as a Ray job.

    Example: `cappy.generate("demo", settings={"workspace": "s3://bucket/demo"})["pairs"]`
    """
    return _run("generate", config, settings, overwrite, address)


def extend(
    source: str,
    destination: str,
    *,
    settings: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    address: str | None = None,
) -> dict[str, Any]:
    """Publish the rows and candidates of the published set `source` with new ones at `destination`, and return its summary.

    The config is that of `source` with `settings` on top: more rows of `source`, other `sampler.decodings`, or another `sampler.model`.
    Only the missing candidates are sampled. `source` is not changed. Call it again to resume an interrupted run. `overwrite` and
    `address` are as for `generate`.

    Example: `cappy.extend("runs/demo/dataset", "runs/more", settings={"sampler.decodings": [{"name": "hot", "temperature": 1.3}]})`
    """
    from generation.extend import read_config

    config = read_config(source, destination, settings or {})
    return _run("extend", config, None, overwrite, address, src=source, dst=destination)


def combine(sources: Sequence[str], destination: str, *, overwrite: bool = False) -> dict[str, Any]:
    """Publish several sets with different rows as one set at `destination`, by reference, and return its summary.

    No file is copied: the new set names the files of its sets, and `push` copies them into one folder. The same combination that is
    already published is kept. `overwrite` replaces another set at the destination.

    Example: `cappy.combine(["runs/first/dataset", "runs/second/dataset"], "runs/both")`
    """
    from generation.combine import run_combine

    return run_combine(sources, destination, overwrite=overwrite)


def annotate(
    source: str,
    destination: str,
    *,
    feedback: str | None = None,
    settings: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    address: str | None = None,
) -> dict[str, Any]:
    """Label the published set `source` by another metric, publish it at `destination`, and return its summary.

    Samples nothing. The settings are `generate.label.metric` (`rouge_l`, `token_f1`, `chrf`, `exact_match` or a function
    `package.module:function`) and `generate.label.mode`. References, answer choices and mismatched references keep their labels.

    With `feedback`, a file with the `id` of answers and a `reference` or a `rating` of each, `source` is a log of served candidates
    (`serving.log_candidates`).

    Example: `cappy.annotate("runs/demo/dataset", "runs/demo/chrf", settings={"generate.label.metric": "chrf"})`
    """
    given = {"feedback": feedback} if feedback else {}
    return _run("annotate", None, settings, overwrite, address, src=source, dst=destination, **given)


def train(
    config: ConfigLike = None, *, settings: Mapping[str, Any] | None = None, overwrite: bool = False, address: str | None = None
) -> dict[str, Any]:
    """Train the scorer on the regression set, publish it at `config.scorer_uri`, and return its summary.

    Call it again to resume an interrupted run from its last checkpoint. `overwrite` and `address` are as for `generate`.

    Example: `cappy.train("demo", settings={"training.epochs": 2})["validation"]`
    """
    return _run("train", config, settings, overwrite, address)


def adapt(
    config: ConfigLike = None, *, settings: Mapping[str, Any] | None = None, overwrite: bool = False, address: str | None = None
) -> dict[str, Any]:
    """Fine-tune a published scorer for each task and publish each result that is better on the task's validation rows.

    Samples the regression set first if none is published. Returns a summary with one outcome for each task in `tasks`; `failed`
    is the number of failed tasks. `overwrite` and `address` are as for `generate`.

    Example: `cappy.adapt("adapt", settings={"adapt.method": "lora"})["published"]`
    """
    return _run("adapt", config, settings, overwrite, address)


def evaluate(
    config: ConfigLike = None,
    *,
    suite: str | None = None,
    data: str | None = None,
    settings: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    address: str | None = None,
) -> dict[str, Any]:
    """Compare the scorer's choice with greedy decoding, sampling, self-scores and the oracle, and return the summary.

    Writes `results.json`, `rows.parquet` and `report.html` to `config.evaluation_uri`. `overwrite` and `address` are as for
    `generate`. `suite` is a suite to run instead of `config`: `bigbench`, `promptsource`, `questions`, or a YAML file. `data` is a
    folder with the rows of the suite.

    Example: `cappy.evaluate("demo")["gain"]`
    """
    config, overrides = suite_config(config, suite, data, ())
    loaded = load(config, overrides) if suite else config
    return _run("evaluate", loaded, settings, overwrite, address)


def compare(first: str, second: str, *, methods: Sequence[str] = ()) -> dict[str, Any]:
    """Return the paired differences of two published evaluations on their common rows, `second` - `first`, for each method.

    `methods` selects the methods; by default all methods that both have are compared.

    Example: `cappy.compare("runs/a/evaluation", "runs/b/evaluation")["methods"]["scorer"]["difference"]`
    """
    from evaluation.compare import run_compare

    return run_compare(first, second, methods=tuple(methods))


def suite_config(config: Any, suite: str | None, data: str | None, overrides: Sequence[str]) -> tuple[Any, list[str]]:
    """Return the config of `cappy evaluate` and its overrides, for a suite that reads its rows from `data`.

    Raises `UsageError` for a suite beside a config, for data without a suite, and for an unknown suite.
    """
    from evaluation.suites import suite_file

    if suite is None:
        if data is not None:
            raise UsageError(f"--data={data} is for a suite; give --suite NAME, or set source.path")
        return config, list(overrides)
    if config is not None:
        raise UsageError(f"--suite {suite} beside a config; give one of them, and change settings with --set")
    rows = [f"source={json.dumps({'kind': 'files', 'path': data})}"] if data is not None else []
    return suite_file(suite), [*rows, *overrides]


def answer(
    config: ConfigLike | Sequence[Prompt] = None,
    *,
    llm: str | None = None,
    scorer: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    address: str | None = None,
) -> Any:
    """Answer a data set or a list of prompts by boosted decoding: the LLM samples candidates, and the scorer selects the best.

    With a config, answer the instructions of its source, publish the answers at `config.answers_uri`, and return their summary. Call it
    again to resume an interrupted run. `overwrite` and `address` are as for `generate`.

    With a list of prompts, answer them on this machine and return a pandas DataFrame with one row for each prompt, in order. A prompt is
    a text, a chat (a list of turns), or a dict with an instruction and further columns. `error` has the reason of a prompt without an
    answer.

    `llm` is `sampler.model` and `scorer` is `scorer_path`. Without a scorer, that of the workspace or of the package is used.

    Example: `cappy.answer(["Name a red fruit."], settings={"answer.candidates": 8})["response"]`
    """
    if isinstance(config, Sequence) and not isinstance(config, str):
        from cappy.notebook import answer_prompts

        if overwrite or address:
            raise UsageError("overwrite and address are for a config; a list of prompts is answered on this machine")
        return answer_prompts(config, llm, scorer, settings)
    given = {**(settings or {}), **({"sampler.model": llm} if llm else {}), **({"scorer_path": str(scorer)} if scorer else {})}
    return _run("answer", config, given, overwrite, address)


def score(
    source: str,
    destination: str,
    *,
    scorer: str | Path | None = None,
    keep_above: float | None = None,
    top_per_instruction: int | None = None,
    prompt: str | None = None,
    response: str | None = None,
    settings: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    address: str | None = None,
) -> dict[str, Any]:
    """Score the pairs of an instruction and a response in files, publish them with their scores, and return the summary.

    Call it again to resume an interrupted run. `overwrite` and `address` are as for `generate`.

    Args:
        source: A file, a folder, a glob or a published folder, local or s3://.
        destination: An empty folder or s3:// prefix.
        scorer: The scorer. Without it, `scorer_path`, the scorer of the workspace or of the package is used.
        keep_above: Smallest score of a published row.
        top_per_instruction: Largest number of published rows of an instruction, the best ones.
        prompt: The column with the prompt. The default finds it by the names of public datasets.
        response: The column with the response. The default finds it by the names of public datasets.
        settings: Further settings, by dotted key.

    Example: `cappy.score("pairs.parquet", "runs/scores", keep_above=0.5)["rows"]`
    """
    given = {**(settings or {}), **score_settings(scorer, keep_above, top_per_instruction, prompt, response)}
    return _run("score", None, given, overwrite, address, src=source, dst=destination)


def score_settings(
    scorer: str | Path | None, keep_above: float | None, top_per_instruction: int | None, prompt: str | None, response: str | None
) -> dict[str, Any]:
    """Return the options of `cappy score` as settings by dotted key; None is left out."""
    options = {
        "scorer_path": None if scorer is None else str(scorer),
        "score.keep_above": keep_above,
        "score.top_per_instruction": top_per_instruction,
        "score.prompt": prompt,
        "score.response": response,
    }
    return {name: value for name, value in options.items() if value is not None}


def serve(config: ConfigLike = None, *, settings: Mapping[str, Any] | None = None, address: str | None = None) -> dict[str, Any]:
    """Serve the best of several answers behind an OpenAI-compatible endpoint; return after SIGTERM or an interrupt.

    With `address` the server runs on the head node of that cluster until `ray job stop`.

    Example: `cappy.serve("demo", settings={"serving.port": 9000})`
    """
    return _run("serve", config, settings, False, address)


def inspect(uri: str, *, samples: int = 2, verify: bool = True) -> dict[str, Any]:
    """Return the kind, summary, size and first rows of a published folder, and the problems with its files.

    With `verify` each file is checked against its SHA-256; `problems` is empty if all files are intact. `samples` is the number of
    rows of a regression set.

    Example: `cappy.inspect("s3://bucket/demo/dataset")["problems"]`
    """
    from cappy.inspection import run_inspect

    return run_inspect(uri, samples=samples, verify=verify)


def list_published(uri: str) -> list[dict[str, Any]]:
    """Return the published folders and the unfinished runs at and below a folder or s3:// prefix, as `cappy list` shows them.

    Each entry has `path`, `uri`, `kind`, `created`, `rows`, `bytes`, `files` and `problem`.

    Example: `[each["uri"] for each in cappy.list_published("s3://bucket/demo") if each["kind"] == "dataset"]`
    """
    from cappy.listing import list_published as find

    return [dict(entry) for entry in find(uri)]


def push(source: str, destination: str, *, pairs: bool = False) -> dict[str, Any]:
    """Copy a published folder to an empty folder, an s3:// prefix or the Hugging Face hub; return a summary.

    Each file is checked against its SHA-256. Call it again to resume an interrupted copy. On the hub (`hf://datasets/owner/name` or, for
    a scorer, `hf://owner/name`) the push is one commit, which is `commit` of the summary. With `pairs` the pairs of a regression set are
    published as a plain table, one row for each pair.

    Example: `cappy.push("runs/demo/scorer", "s3://bucket/demo/scorer")`
    """
    if pairs:
        from generation.export_pairs import export_pairs

        return export_pairs(source, destination)
    if is_hub(destination):
        from cluster.hub_push import push_folder

        return push_folder(source, destination)
    from cluster.copying import copy_folder

    return copy_folder(source, destination)


def export(
    source: str,
    destination: str,
    form: str,
    *,
    by: str | None = None,
    per_instruction: int | None = None,
    margin: float | None = None,
    threshold: float | None = None,
    sources: Sequence[str] = (),
    prompt: str = "instruction",
    response: str = "response",
    messages: bool = False,
    system: str | None = None,
    duplicates: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Publish a regression set, pairs, answers or scores in the columns of another library; return a summary with the counts.

    Args:
        source: A published folder or s3:// prefix with Parquet files.
        destination: An empty folder or s3:// prefix.
        form: `sft`, `dpo`, `reward` or `kto` (TRL), `chat` (OpenAI), `pairs`, or `ranking` (sentence-transformers).
        by: The column, or field of a candidate, that ranks the responses. The default is `label` of a regression set, else `score`.
        per_instruction: Largest number of rows of an instruction; of responses of each label (kto), or of documents (ranking).
        margin: Smallest difference between the values of better and worse responses (dpo, reward, kto, ranking).
        threshold: Smallest value of a response (sft, chat), or of a desirable response (kto; the default is 0.5).
        sources: Sources of candidates to use. The default is `sampled`, and all for `pairs` and `ranking`.
        prompt: The column with the prompt.
        response: The column, or field of a candidate, with the response.
        messages: Write prompts and responses as lists of chat messages.
        system: A system message before each prompt (chat, or with `messages`).
        duplicates: Publish all pairs of a regression set with all columns, as `push` with `pairs` (pairs).
        overwrite: Replace an export that is published at the destination.

    Example: `cappy.export("runs/demo/dataset", "runs/demo/dpo", "dpo", margin=0.2)["rows"]`
    """
    from generation.export import ExportOptions, run_export

    options = ExportOptions(form, by, prompt, response, tuple(sources), per_instruction, margin, threshold, messages, system, duplicates)
    return run_export(source, destination, options, overwrite=overwrite)


def run(
    pipeline: str | Path,
    *,
    settings: Mapping[str, Any] | Sequence[str] = (),
    redo: Sequence[str] = (),
    dry_run: bool = False,
    address: str | None = None,
) -> dict[str, Any]:
    """Run the steps of a pipeline that are not finished, in the order of their data; return the state and the minutes of each step.

    Call it again to resume. A step is kept while its settings and the versions of its inputs are those of its published output.

    Args:
        pipeline: The path of a YAML file, or the name of a file in `cappy/pipelines/`.
        settings: Changes of the settings of all steps.
        redo: Names of steps whose output may be deleted and made again, with the outputs that are made from it.
        dry_run: Return the plan with an estimate of the costs, and change nothing.
        address: The dashboard of a Ray cluster. The whole pipeline then runs there as one Ray job.

    Example: `cappy.run("demo", dry_run=True)["steps"]`
    """
    from cappy.pipeline import run_pipeline, submit_pipeline
    from cappy.pipeline_file import read_pipeline

    steps = read_pipeline(pipeline, settings)
    command = f"cappy run {pipeline}"
    if address:
        return submit_pipeline(steps, address, redo=redo, dry_run=dry_run, command=command)
    return run_pipeline(steps, redo=redo, dry_run=dry_run, command=command)


def pull(source: str, destination: str | None = None) -> dict[str, Any]:
    """Copy a published folder to this machine, checked as by `push`; return a summary.

    Without `destination` the folder gets the last part of `source` as its name, in the working directory. From the hub, the revision is
    resolved to a commit first, which is `commit` of the summary.

    Example: `cappy.pull("s3://bucket/demo/scorer")["uri"]`
    """
    from cluster.copying import copy_folder
    from cluster.hub import parse

    target = destination or (parse(source, "SRC").folder_name if is_hub(source) else source.rstrip("/").rsplit("/", 1)[-1])
    if is_s3(target) or is_hub(target):
        raise UsageError(f"DST={target} is not on this machine; copy between stores with `cappy push {source} {target}`")
    return copy_folder(source, target)


def _run(
    verb: str, config: ConfigLike, settings: Mapping[str, Any] | None, overwrite: bool, address: str | None, **places: str
) -> dict[str, Any]:
    from cappy.jobs import run_verb

    return run_verb(verb, load(config, settings or {}), overwrite=overwrite, address=address, **places)
