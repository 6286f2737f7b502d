"""Write the dataset card (README.md) of a published set, and a plot of its labels (labels.svg).

Both depend only on the manifest, so they can be written again from it. Reads no environment variables and imports no Ray.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from cluster import folder_writer
from generation.dataset import LABEL_BINS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GIVEN = ("reference", "choice", "mismatched")
"""Sources with a fixed label, 1 or 0."""

_MAX_DATASETS = 100
_COPY_NOTE = "Use the path of your copy. For s3:// paths, `datasets` and pandas need `s3fs`; or download the set with `cappy pull`.\n"
_COLUMNS = {
    "id": "32 hex digits, a hash of dataset, template, instruction and references",
    "dataset": "the task or dataset of the row",
    "template": "the prompt template or subtask, or null",
    "instruction": "the instruction as the source has it, without shots",
    "references": "every correct response",
    "answer_choices": "all choices of a classification row (such rows are not sampled), or null",
    "candidates": "a list of `response`, `label`, `source`, `model`, `decoding`, `tokens`, `finish_reason`, `logprob`",
    "response": "the text, without outer white space",
    "label": "in [0, 1]: 1 for a reference, 0 for a wrong choice or a mismatched reference, else the value of the metric",
    "source": "`reference`, `choice`, `mismatched` or `sampled`",
    "model": "the LLM of a sampled response; this field and the fields below are null unless `source` is `sampled`",
    "decoding": "name of the decoding",
    "tokens": "number of sampled tokens",
    "logprob": "sum of the log-probabilities of the tokens, in nats, at temperature 1",
}
_SIZES = [(10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"), (10**8, "10M<n<100M")]


def write_card(uri: str, manifest: dict[str, Any], check: Callable[[], None] | None = None) -> dict[str, Any]:
    """Write `README.md` and `labels.svg` of a set; return its manifest with both among its files. The caller publishes it.

    `check` is called before each write; see `cluster.folder_writer.FolderWriter`.
    """
    folder = folder_writer.FolderWriter(uri, check)
    made = {
        "labels.svg": folder.write_bytes("labels.svg", plot_labels(manifest["summary"]["source_labels"])),
        "README.md": folder.write_bytes("README.md", render_card(manifest).encode()),
    }
    return {**manifest, "files": manifest["files"] | made}


def plot_labels(labels: Mapping[str, Sequence[int]], form: str = "svg") -> bytes:
    """Plot the label counts of each source and return the image.

    `labels` has `LABEL_BINS` counts per source, `form` is `svg` or `png`. The left plot is a histogram of the samples, whose
    label is computed. The right plot has the totals of the sources with a fixed label.
    """
    figure = _new_figure(8)
    samples, given = figure.subplots(1, 2, width_ratios=[3, 2])
    _draw_histogram(samples, labels.get("sampled", [0] * LABEL_BINS), xlabel="label", ylabel="responses", title="sampled")
    names = [name for name in GIVEN if name in labels]
    bars = given.barh(
        [f"{name} ({1 if name == 'reference' else 0})" for name in names],
        [sum(labels[name]) for name in names],
        color=["#3b8f5a" if name == "reference" else "#c8552d" for name in names],
        height=0.6,
    )
    given.bar_label(bars, fmt="{:,.0f}", padding=3)
    given.set(title="given (label)", ylim=(len(GIVEN) - 0.4, -0.6))
    given.margins(x=0.3)
    given.xaxis.set_visible(False)
    given.spines["bottom"].set_visible(False)
    given.tick_params(axis="y", length=0)
    given.spines[["top", "right"]].set_visible(False)
    return _save_figure(figure, form)


def plot_histogram(counts: Sequence[int], **texts: str) -> bytes:
    """Plot counts in equal bins of [0, 1] and return the SVG image. `texts` are `xlabel`, `ylabel` and `title`."""
    figure = _new_figure(5)
    _draw_histogram(figure.subplots(), counts, **texts)
    return _save_figure(figure, "svg")


def _new_figure(width: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 3), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw_histogram(axes: Axes, counts: Sequence[int], **texts: str) -> None:
    from matplotlib.ticker import StrMethodFormatter

    bins = len(counts)
    axes.bar([(bin_ + 0.5) / bins for bin_ in range(bins)], counts, 0.92 / bins, color="#1f5fa8")
    axes.set(xlim=(0, 1), xticks=[0, 0.2, 0.4, 0.6, 0.8, 1], **texts)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.spines[["top", "right"]].set_visible(False)


def _save_figure(figure: Figure, form: str) -> bytes:
    import matplotlib

    sink = io.BytesIO()
    # A fixed salt and no date: equal counts give equal bytes, and so an equal SHA-256.
    with matplotlib.rc_context({"svg.hashsalt": "cappy-ray"}):
        figure.savefig(sink, format=form, metadata={"Date": None} if form == "svg" else None)
    return sink.getvalue()


def render_card(manifest: Mapping[str, Any]) -> str:
    """Return the dataset card of a set, or of a table of pairs: Markdown with the YAML header of the Hugging Face hub."""
    summary, config, metric = manifest["summary"], manifest["config"], manifest["metric"]
    pairs = manifest["kind"] == "pairs"
    combines = manifest.get("combines")
    refers = any("uri" in entry for entry in manifest["files"].values())
    log = manifest.get("lineage", {}).get("log")
    rows = summary["pairs"] if pairs else summary["instructions"]
    license_ = config["generate"].get("license") or "unknown"
    header = {
        "license": license_,
        "task_categories": ["text-generation", "text-ranking"],
        "size_categories": [size_category(rows)],
        "tags": ["cappy-ray", "regression", metric["name"].replace("_", "-")],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"data/{split}/part-*.parquet"} for split in manifest["counts"]],
            }
        ],
    }
    datasets = sorted(summary["datasets"].items(), key=lambda item: (-item[1], item[0]))
    counts = markdown_table(
        ("split", "instructions", "pairs"),
        [(split, f"{each['instructions']:,}", f"{each['pairs']:,}") for split, each in manifest["counts"].items()],
    )
    sources = markdown_table(("source", "pairs"), [(name, f"{count:,}") for name, count in summary["sources"].items()])
    by_dataset = markdown_table(("dataset", "instructions"), [(name, f"{count:,}") for name, count in datasets[:_MAX_DATASETS]])
    if len(datasets) > _MAX_DATASETS:
        by_dataset += f"\n\nand {len(datasets) - _MAX_DATASETS:,} more; `_MANIFEST.json` lists all."
    columns = markdown_table(
        ("column", "type", "description"), [(name, kind, _COLUMNS.get(name, "")) for name, kind in _column_types(manifest["schema"])]
    )
    notes = _labels_line(metric) + _merged_line(summary) + _missing_lines(summary) + _unseen_line(summary, metric)
    notes += _sampling_lines(manifest) + _made_from_line(manifest)
    size = f"{summary['instructions']:,} instructions, {summary['pairs']:,} pairs, {summary['tokens']:,} sampled tokens"
    return f"""---
{yaml.safe_dump(header, sort_keys=False, allow_unicode=True).strip()}
---

# {"Pairs of a" if pairs else "A"} Cappy regression set

Instructions with labelled responses, to train a scorer (Cappy, arXiv 2311.06720). {_labels_text(metric)}
{"One row per pair" if pairs else "One row per instruction, with its candidates as a list"}: {size}.

{counts}

{sources}

![labels by source](labels.svg)

## Load it

{"" if refers else _COPY_NOTE}
{_loading_section(summary["uri"], next(iter(manifest["counts"])), pairs, refers)}

## Columns

{columns}

`dead_letters.jsonl` of a set has the rows that were left out, each with the reason. `_MANIFEST.json` lists every file with its
SHA-256; `cappy inspect` verifies them.

## How it was made

- by `{manifest["command"]}`, code {manifest["code_version"]}, {manifest["created"]}
{_describe_sets(combines) if combines else _describe_run(config, log)}{notes}
{"" if log or combines else _decodings_table(config["sampler"]["decodings"])}
## Instructions by dataset

{by_dataset}

## Licence

{licence_text(license_)}
{canary_section(config["source"])}"""


def size_category(rows: int) -> str:
    """Return the size category of the Hugging Face hub for a number of rows."""
    return next((name for limit, name in _SIZES if rows < limit), "100M<n<1B" if rows < 10**9 else "n>1B")


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown; columns with numbers are aligned to the right."""
    rule = ["--:" if name in ("n", "pairs", "instructions", "rows", "count") else "---" for name in head]
    return "\n".join("| " + " | ".join(_escape_cell(text) for text in line) + " |" for line in (head, rule, *rows))


def _escape_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _describe_run(config: Mapping[str, Any], log: str | None) -> str:
    return (
        f"- `config.yaml` has every setting\n- instructions: {_describe_sources(config['source'])}\n- LLM: `{config['sampler']['model']}`\n"
        f"{_log_line(log) if log else _prompt_line(config['sampler']['prompt'])}- seed: {config['seed']}\n"
    )


def _describe_sets(combines: Sequence[Mapping[str, Any]]) -> str:
    """Return a line for each set of a combined set."""
    lines = []
    for each in combines:
        config = each["config"]
        decodings = ", ".join(decoding["name"] for decoding in config["sampler"]["decodings"])
        lines.append(
            f"- {each['instructions']:,} instructions of `{each['uri']}`: {_describe_sources(config['source'])}; LLM "
            f"`{config['sampler']['model']}`; decodings {decodings}; seed {config['seed']}\n"
        )
    return "".join(lines)


def _prompt_line(prompt: Mapping[str, Any]) -> str:
    return f"- prompt: {prompt['form']} form, {prompt['shots']} shots{', with a system message' if prompt['system'] else ''}\n"


def _log_line(log: str) -> str:
    return (
        f"- candidates: from the log of `cappy serve` in `{log}`. The prompt form and the settings of the decodings are unknown: requests\n"
        f"  can change them, and the log has only the names of the decodings. The sampler in `config.yaml` is not that of the server\n"
    )


def _decodings_table(decodings: Sequence[Mapping[str, Any]]) -> str:
    rows = [(each["name"], str(each["n"]), _decoding_settings(each)) for each in decodings]
    return markdown_table(("decoding", "n", "settings"), rows) + "\n"


def _decoding_settings(decoding: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_format_setting(value)}" for key, value in decoding.items() if _is_worth_listing(key, value))


def _is_worth_listing(key: str, value: Any) -> bool:
    """Return whether the card lists a setting of a decoding: temperature always, other settings unless they are off."""
    if key == "temperature":
        return True
    return key not in ("name", "n") and value not in (None, [], 0) and not (key in ("top_p", "beams") and value == 1)


def _format_setting(value: Any) -> str:
    return ", ".join(repr(each) for each in value) if isinstance(value, list) else f"{value:g}" if isinstance(value, float) else str(value)


def _column_types(schema: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the columns with their types; the fields of structs are left out."""
    plain = {"list<item: string>": "list of strings"}
    return [(name, "list of structs" if "struct<" in kind else plain.get(kind, kind)) for name, kind in schema.items()]


def _metric_name(metric: Mapping[str, Any]) -> str:
    return {"rouge_l": "Rouge-L"}.get(metric["name"], str(metric["name"]))


def _labels_text(metric: Mapping[str, Any]) -> str:
    if metric["name"] == "rating":
        return "The label of a response is\nits rating by users, in [0, 1]."
    return (
        "Correct responses have label 1 and wrong\n"
        f"responses have label 0. The label of a response sampled from an LLM is its {_metric_name(metric)} against the references."
    )


def _labels_line(metric: Mapping[str, Any]) -> str:
    return f"- labels: {_metric_name(metric)} ({_mode(metric)}version {metric['version']})\n"


def _mode(metric: Mapping[str, Any]) -> str:
    return f"{metric['mode']} mode, " if metric["mode"] else ""


def _loading_section(uri: str, split: str, pairs: bool, refers: bool) -> str:
    if refers:
        return f"""The shards of a combined set are in the folders of its sets, and `_MANIFEST.json` has the location of each.
`cappy push` copies them into one folder. Cappy on Ray reads the set as it is:

```python
from generation.dataset import RegressionSet
rows = RegressionSet("{uri}").to_huggingface("{split}")
```"""
    files = f"{uri}/data/{split}/part-*.parquet"
    regression_set = (
        ""
        if pairs
        else f"""```python
from generation.dataset import RegressionSet     # Cappy on Ray; streams and verifies page checksums
for batch in RegressionSet("{uri}").pairs("{split}"):
    batch.instructions, batch.responses, batch.labels
```

"""
    )
    return f"""{regression_set}```python
import datasets
datasets.load_dataset("parquet", data_files={{"{split}": "{files}"}})
```

```sql
-- DuckDB
select dataset, count(*) from '{files}' group by 1;
```

```python
import pandas
pandas.read_parquet("{uri}/data/{split}")
```"""


def _describe_sources(source: Mapping[str, Any]) -> str:
    """Describe the sources of a config in one line: the kind of each with its texts and lists, also within a mixture."""
    found = []
    for each in _find_sources(source):
        shown = {key: value for key, value in each.items() if key != "kind" and isinstance(value, str | list) and value}
        settings = "; ".join(f"{key} {', '.join(map(str, value)) if isinstance(value, list) else value}" for key, value in shown.items())
        found.append(f"{each['kind']} ({settings})" if settings else str(each["kind"]))
    return "; ".join(found)


def _find_sources(tree: Any) -> list[Mapping[str, Any]]:
    """Return the innermost mappings of a tree that have a `kind`."""
    if isinstance(tree, list):
        return [leaf for each in tree for leaf in _find_sources(each)]
    if not isinstance(tree, Mapping):
        return []
    below = [leaf for each in tree.values() for leaf in _find_sources(each)]
    return below or ([tree] if "kind" in tree else [])


def _merged_line(summary: Mapping[str, Any]) -> str:
    merged = summary.get("merged", 0)
    return f"- {merged:,} repeated rows of the source were merged; their references are united\n" if merged else ""


def _missing_lines(summary: Mapping[str, Any]) -> str:
    empty, missing = summary.get("empty_responses", 0), summary.get("missing_responses", 0)
    return (f"- {empty:,} sampled responses are empty\n" if empty else "") + (
        f"- {missing:,} responses are missing, because a content filter stopped them\n" if missing else ""
    )


def _unseen_line(summary: Mapping[str, Any], metric: Mapping[str, Any]) -> str:
    unseen = summary.get("unseen_references", 0)
    if not unseen or metric["mode"] != "paper":
        return ""
    return (
        f"- **labels too low**: {unseen:,} instructions have references that {_metric_name(metric)} in paper mode cannot see, because it\n"
        f"  reads Latin letters and digits only; `cappy annotate` with `generate.label.mode=unicode` computes their labels again\n"
    )


def _sampling_lines(manifest: Mapping[str, Any]) -> str:
    limits, reused, extends = (manifest.get(name) for name in ("max_tokens", "reused", "extends"))
    lines = ""
    if limits:
        lines += (
            f"- largest length of a candidate: the lengths of the references of its dataset decide it ({min(limits.values())} to "
            f"{max(limits.values())} tokens, at\n  most `max_tokens` of the decoding); `_MANIFEST.json` lists the datasets\n"
        )
    if reused:
        sources = ", ".join(f"`{uri}` ({rows:,})" for uri, rows in reused["sources"].items())
        lines += f"- the sampled responses of {reused['rows']:,} instructions are from earlier sets, with new labels: {sources}\n"
    if extends:
        lines += (
            f"- it extends the set `{extends['uri']}` (version {extends['version']}): {extends['rows']:,} instructions and\n"
            f"  {extends['candidates']:,} sampled responses are from it\n"
        )
    for record in manifest.get("sampling", [])[1:]:
        decodings = "; ".join(f"{each['name']} ({_decoding_settings(each)})" for each in record["decodings"])
        prompt = record["prompt"]
        lines += f"- earlier responses of `{record['model']}` ({prompt['form']} form, {prompt['shots']} shots): {decodings}\n"
    return lines


def _made_from_line(manifest: Mapping[str, Any]) -> str:
    return f"- made from: `{manifest['made_from']['uri']}`\n" if "made_from" in manifest else ""


def licence_text(license_: str) -> str:
    """Return the paragraph of a card about a licence; `unknown` is none."""
    if license_ != "unknown":
        return f"{license_}, as set by `generate.license`."
    return (
        "Unknown: the instructions and references keep the licences of their datasets, and the terms of the LLM can apply to its\n"
        "responses. Check both before you publish the set, and set `generate.license` to the result."
    )


def canary_section(source: Mapping[str, Any]) -> str:
    """Return the section of a card about the canary string of BIG-bench, if rows of this source are from BIG-bench."""
    if not any(leaf["kind"] == "bigbench" for leaf in _find_sources(source)):
        return ""
    return """
## BIG-bench canary

Rows of this set are from BIG-bench, whose texts have a canary string: they must never be part of a pretraining corpus. Use them
to evaluate, or to adapt to a task with its train rows. Never pretrain on them.
"""
