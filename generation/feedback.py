"""Publish a regression set from the log of served candidates and a file of references or ratings: `cappy annotate LOG DST --feedback FILE`.

A row of the file has the `id` of an answer and `reference` (a text or a list of texts) or `rating` (in [0, 1]). With references, all
candidates of the answer get labels by the metric, as in `generate`. A rating is the label of the rated response; the other candidates are
left out, because their quality is unknown. Every verb that reads a regression set reads the result.

Memory holds the answers with feedback. Samples nothing, loads no model and imports no Ray.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from cluster import artifacts, folder_writer, lease, storage
from cluster.config import Config, FilesSource, LabelConfig
from cluster.errors import CappyError, UsageError
from cluster.progress import log
from generation import dataset, dataset_card, labels, shards
from generation.schema import CANDIDATE_LOG, DATASET, SAMPLED, SPLITS
from generation.sources import files
from generation.sources.row import DeadLetter, Instruction, dead_letter, is_encodable
from generation.sources.split import assign_split, longest_sentence

RATING = {"name": "rating", "mode": None, "version": 1}
"""The metric in the manifest of a set whose labels are ratings."""
_OWNED = artifacts.OwnedFiles("dataset", "annotate", dataset.WORKING_FILES, r"_staging/run\.json", dataset.RESULT_FILES)
_LEASE = "_lease"
_SAMPLED = tuple(each.name for each in SAMPLED.value_type)
Answer = tuple[str, int]
"""Id of an answer and number of its prompt."""


@dataclass
class Feedback:
    """The references or the ratings of one prompt of an answer."""

    where: str
    """The first row of the file about it."""
    dataset: str = "served"
    references: list[str] = field(default_factory=list)
    ratings: dict[str | None, list[float]] = field(default_factory=dict)
    """Ratings by response; None is the first choice of the answer."""


def run_feedback(config: Config, *, src: str, dst: str, feedback: str, overwrite: bool = False) -> dict[str, Any]:
    """Publish the answers of the log `src` that have feedback as a regression set at `dst`; return its summary.

    The instruction decides the split. Rows that cannot be used are in `dead_letters.jsonl` with the reason.

    Raises `UsageError` if `feedback` has both references and ratings, `src` is not a log, or `dst` holds other files. Raises
    `CappyError` if no answer has usable feedback, or another run holds the lease.
    """
    start = time.monotonic()
    uri = storage.check_uri(dst, "DST")
    log_uri = storage.check_uri(src, "SRC")
    artifacts.refuse_nested(log_uri, uri)
    if not overwrite:
        artifacts.refuse_published(uri, "DST", "annotate")
    artifacts.refuse_foreign(uri, "DST", _OWNED, overwrite=overwrite)
    given, letters = read_feedback(feedback)
    rated = any(each.ratings for each in given.values())
    if rated and any(each.references for each in given.values()):
        raise UsageError(f"--feedback={feedback} has references and ratings, and a set has labels of one kind; make two files and two sets")
    rows = _label_answers(log_uri, given, letters, config.generate.label, rated=rated)
    if not rows:
        first = f" (first problem: {letters[0].where}: {letters[0].reason})" if letters else ""
        raise CappyError(f"SRC={src}: no answer there has usable feedback in --feedback={feedback}{first}; check the ids and the folder")
    if letters:
        log(f"annotate: {len(letters):,} rows cannot be used; the first: {letters[0].where}: {letters[0].reason}")
    models = Counter(candidate["model"] for row in rows for candidate in row["candidates"] if candidate["model"])
    source = FilesSource(kind="files", path=log_uri)
    sampler = config.sampler.model_copy(update={"model": models.most_common(1)[0][0]}) if models else config.sampler
    config = config.model_copy(update={"source": source, "sampler": sampler})
    split: dict[str, list[dict[str, Any]]] = {name: [] for name in SPLITS}
    for row in rows:
        split[assign_split(longest_sentence(row["instruction"]), source.validation_fraction)].append(row)
    split = {name: part for name, part in split.items() if part}
    with lease.hold(storage.join(uri, _LEASE), f"DST={uri}") as held:
        artifacts.clear_destination(uri, "DST", _OWNED, _LEASE, held.check, overwrite=overwrite)
        artifacts.refuse_published(uri, "DST", "annotate")
        metric = RATING if rated else labels.describe_metric(config.generate.label)
        made = {"log": log_uri, "feedback": storage.absolute(feedback)}
        summary = _publish(uri, split, letters, made, metric, config, start, held.check)
        held.finish()
    return summary


def read_feedback(path: str) -> tuple[dict[Answer, Feedback], list[DeadLetter]]:
    """Return the feedback of a file, a folder or a glob by answer, and the rows that are none with the reason.

    Several references of an answer are all correct. Several ratings of a response count by their mean.
    """
    given: dict[Answer, Feedback] = {}
    letters: list[DeadLetter] = []
    for file in files.find_data_files(path, "--feedback"):
        for where, row in files.read_rows(file):
            problem = None if isinstance(row, DeadLetter) else _add(row, where, given)
            if isinstance(row, DeadLetter):
                letters.append(row)
            elif problem:
                letters.append(dead_letter(where, problem, row))
    return given, letters


def _add(row: Any, where: str, given: dict[Answer, Feedback]) -> str | None:
    """Add a row of a feedback file; return the reason if it cannot be used."""
    if not isinstance(row, Mapping) or not isinstance(row.get("id"), str) or not row["id"]:
        return "no id; give the id of the answer as a text"
    try:
        prompt = int(row.get("prompt") or 0)
        rating = None if row.get("rating") in (None, "") else float(row["rating"])
    except (TypeError, ValueError, OverflowError):
        return f"prompt={row.get('prompt')!r} or rating={row.get('rating')!r} is not a number"
    given_references = row.get("reference")
    references = given_references if isinstance(given_references, list) else [] if given_references is None else [given_references]
    if not all(isinstance(each, str) and each.strip() and is_encodable(each) for each in references):
        return "reference is empty or not a text; give a text or a list of texts"
    for name in ("response", "dataset"):
        if row.get(name) is not None and not (isinstance(row[name], str) and is_encodable(row[name])):
            return f"{name} is not a text"
    if bool(references) == (rating is not None):
        return f"needs either reference or rating, and has {'both' if references else 'neither'}"
    if rating is not None and not 0 <= rating <= 1:
        return f"rating={rating:g} is outside [0, 1]"
    found = given.setdefault((row["id"], prompt), Feedback(where))
    found.dataset = row.get("dataset") or found.dataset
    found.references = list(dict.fromkeys((*found.references, *(each.strip() for each in references))))
    if rating is not None:
        found.ratings.setdefault(row.get("response") or None, []).append(rating)
    return None


def _label_answers(
    uri: str, given: Mapping[Answer, Feedback], letters: list[DeadLetter], label: LabelConfig, *, rated: bool
) -> list[dict[str, Any]]:
    """Return rows of a set for the answers with feedback; answers with the same instruction and references become one row.

    If such answers have the same response, its label is the mean of all its ratings.
    """
    rows: dict[str, dict[str, Any]] = {}
    missing = dict(given)
    for file in files.find_data_files(uri, "SRC"):
        for _, row in files.read_rows(file):
            if isinstance(row, DeadLetter):
                letters.append(row)
                continue
            if not isinstance(row, Mapping) or (lacking := sorted(set(CANDIDATE_LOG.names) - row.keys())):
                columns = f": no column {lacking[0]}" if isinstance(row, Mapping) else ""
                raise UsageError(f"SRC={uri} is not a log of served candidates{columns}; give the folder of serving.log_candidates")
            feedback = missing.pop((row["id"], row["prompt"]), None)
            if feedback is None:
                continue
            sampled = [each for each in row["candidates"] or () if each["response"].strip()]
            known = {each["response"] for each in sampled} | {None for each in sampled if each["picked"] == 0}
            if feedback.ratings.keys() - known:
                letters.append(dead_letter(feedback.where, "a rated response is not a candidate of the answer", {"id": row["id"]}))
            candidates = _rate(sampled, feedback, row["llm"]) if rated else _compare(row, sampled, feedback, label)
            if not candidates:
                continue
            instruction = Instruction(feedback.dataset, None, "", row["instruction"], tuple(feedback.references))
            made = rows.setdefault(
                instruction.id,
                {
                    "id": instruction.id,
                    "dataset": feedback.dataset,
                    "template": None,
                    "instruction": row["instruction"],
                    "references": feedback.references,
                    "answer_choices": None,
                    "candidates": {},
                },
            )
            for each in candidates:
                same = made["candidates"].setdefault((each["source"], each["response"]), each)
                if rated and same is not each:
                    same["label"] += each["label"]
    letters += [dead_letter(each.where, "the log has no answer with this id and prompt", {"id": key[0]}) for key, each in missing.items()]
    for made in rows.values():
        made["candidates"] = list(made["candidates"].values())
        for each in made["candidates"] if rated else ():
            each["label"] = fmean(each["label"])
    return [rows[key] for key in sorted(rows)]


def _compare(row: Mapping[str, Any], sampled: Iterable[Mapping[str, Any]], feedback: Feedback, label: LabelConfig) -> list[dict[str, Any]]:
    """Return the references and the candidates with labels by the metric."""
    pool = [{name: each[name] for name in _SAMPLED} for each in sampled]
    prepared = {"instruction": row["instruction"], "references": feedback.references, "mismatched": [], "answer_choices": None}
    return labels.assemble_candidates([{**prepared, "sampled": pool}], label, row["llm"])[0]


def _rate(sampled: Sequence[Mapping[str, Any]], feedback: Feedback, llm: str) -> list[dict[str, Any]]:
    """Return the rated candidates, each response once, with the list of its ratings as `label`."""
    first = next((each["response"] for each in sampled if each["picked"] == 0), None)
    found: dict[str, dict[str, Any]] = {}
    for each in sampled:
        response = each["response"]
        ratings = feedback.ratings.get(response, []) + (feedback.ratings.get(None, []) if response == first else [])
        if ratings:
            found.setdefault(response, {**{name: each[name] for name in _SAMPLED}, "label": ratings, "source": "sampled", "model": llm})
    return list(found.values())


def _publish(
    uri: str,
    split: Mapping[str, list[dict[str, Any]]],
    letters: list[DeadLetter],
    made: dict[str, Any],
    metric: dict[str, Any],
    config: Config,
    start: float,
    check: Callable[[], None],
) -> dict[str, Any]:
    """Write shards, settings, dead letters and card, then the manifest; return the summary."""
    folder = folder_writer.FolderWriter(uri, check)
    # If this run stops before the manifest exists, this file shows the next run that the other files are its own.
    folder.write_json("_staging/run.json", made)
    written, counts, total = shards.write_rows(folder, split)
    kept = {
        "config.yaml": folder.write_bytes("config.yaml", config.to_yaml().encode()),
        "dead_letters.jsonl": folder.write_bytes("dead_letters.jsonl", "".join(f"{each.to_json()}\n" for each in letters).encode()),
        "decontamination.json": folder.write_json("decontamination.json", {"train_rows_left_out": 0}),
    }
    summary = {"uri": uri, **total, "splits": counts, "dead_letters": len(letters), "seconds": round(time.monotonic() - start, 1)}
    artifacts.publish_folder(
        uri,
        "dataset",
        command="cappy annotate LOG DST --feedback FILE",
        counts=counts,
        schema={each.name: str(each.type) for each in DATASET},
        metric=metric,
        # The log does not have the prompt form and the settings of the decodings, which a request can change.
        lineage={"seed": config.seed, **made, "sampler": {"model": config.sampler.model}, "generate": {"label": metric}},
        summary=summary,
        config=json.loads(config.model_dump_json()),
        files=written | kept,
        describe=lambda uri, manifest: dataset_card.write_card(uri, manifest, check),
        check=check,
    )
    artifacts.cleanup(storage.join(uri, "_staging"), check)
    return summary
