"""Settings of `source` and `decontaminate`: where instructions come from."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from cluster.config.base import Section

# The eight BIG-bench generation tasks the demo and the defaults use.
DEMO_TASKS = (
    "auto_categorization",
    "codenames",
    "tense",
    "qa_wikidata",
    "disfl_qa",
    "rephrase",
    "linguistic_mappings",
    "mult_data_wrangling",
)


class BigBenchSource(Section):
    """BIG-bench generation tasks, out of the PyPI sdist `bigbench==1.0.0`, rendered zero-shot."""

    kind: Literal["bigbench"] = "bigbench"
    tasks: tuple[str, ...] = Field(DEMO_TASKS, min_length=1)
    """Task names, e.g. `tense`; a task with subtasks takes all of them."""
    train_rows: int | None = Field(None, ge=1)
    """At most this many train instructions a task; all of them when null."""
    validation_rows: int | None = Field(None, ge=1)
    """At most this many validation instructions a task; all of them when null."""
    limit: int | None = Field(None, ge=1)
    """Instructions taken, the first ones; all of them when null."""


class RowsSource(Section):
    """What files and hub datasets have in common: rows of some format, and the split."""

    format: Literal["auto", "cappy", "p3", "promptsource", "natural-instructions", "bigbench", "alpaca", "chat"] = "auto"
    """What the rows look like; `auto` tells by the keys of each row (and `promptsource` by `templates`)."""
    templates: str | None = None
    """A PromptSource `templates.yaml`, local or s3://, applied to raw rows; each of its templates gives a row."""
    dataset: str | None = Field(None, min_length=1)
    """Name of the dataset of all rows; null takes the row's own, else the file's or hub dataset's."""
    limit: int | None = Field(None, ge=1)
    """Instructions taken, the first ones; all of them when null."""
    train_rows: int | None = Field(None, ge=1)
    """At most this many train instructions a dataset; all of them when null."""
    validation_rows: int | None = Field(None, ge=1)
    """At most this many validation instructions a dataset; all of them when null."""
    validation_fraction: float = Field(0.2, ge=0, lt=1)
    """Share of the examples (or datasets) without a `split` that go to validation, by hash."""
    split_by: Literal["example", "dataset"] = "example"
    """`example` keeps the instructions of one underlying example on one side, `dataset` those of a whole dataset."""

    @model_validator(mode="after")
    def _templates_need_raw_rows(self) -> RowsSource:
        if (self.format == "promptsource") != (self.templates is not None) and self.format != "auto":
            raise ValueError(
                f"format={self.format} with templates={self.templates}: a templates.yaml goes with format promptsource (or auto), "
                f"and that format needs one"
            )
        return self


class FilesSource(RowsSource):
    """The user's own files: JSONL, Parquet, CSV (a header row) or JSON, in any of the formats of `format`."""

    kind: Literal["files"] = "files"
    path: str = Field(min_length=1)
    """A file, a glob (`data/*.jsonl`) or a folder, local or s3://."""


class HubSource(RowsSource):
    """A Hugging Face dataset, streamed, without any code of its own."""

    kind: Literal["hub"] = "hub"
    name: str = Field(min_length=1)
    """`owner/name`, or a local folder in hub layout."""
    subset: str | None = None
    """The dataset's configuration, where it has several."""
    split: str = "train"
    """The dataset's split that is read; `validation_fraction` divides it."""
    revision: str | None = Field(None, pattern=r"^[0-9a-f]{40}$")
    """The commit to read, 40 hex digits; needed for a name, not for a local folder."""
    data_dir: str | None = Field(None, min_length=1)
    """Folder of the dataset to read, with a folder for each split; null reads the files that its card or layout names."""

    @model_validator(mode="after")
    def _subset_or_folder(self) -> HubSource:
        if self.subset is not None and self.data_dir is not None:
            raise ValueError(f"subset={self.subset} with data_dir={self.data_dir}: each names the files to read; leave one out")
        return self

    @model_serializer(mode="wrap")
    def _without_default_folder(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave `data_dir` out where it is null: runs begun before the setting existed keep their fingerprint."""
        tree: dict[str, Any] = write(self)
        return {name: value for name, value in tree.items() if name != "data_dir" or value is not None}


PlainSource = Annotated[BigBenchSource | FilesSource | HubSource, Field(discriminator="kind")]


class MixturePart(Section):
    """One source of a mixture."""

    name: str | None = None
    """What the part is called in counts; null takes a name from the source."""
    source: PlainSource
    weight: float | None = Field(None, gt=0)
    """Share of the mixture, in the ratio to the other parts' weights; with policy `weights` only."""


class MixtureSource(Section):
    """Several sources as one."""

    kind: Literal["mixture"] = "mixture"
    parts: tuple[MixturePart, ...] = Field(min_length=1)
    policy: Literal["concatenate", "t0", "weights"] = "concatenate"
    """`concatenate` takes all rows; `t0` caps each dataset at `cap` / number of its templates rows a template, as T0 did;
    `weights` draws rows without replacement so that the parts stand in the ratio of their weights, mixed evenly."""
    cap: int = Field(500_000, ge=1)
    """Instructions a dataset has at most under policy `t0`."""
    rows: int | None = Field(None, ge=1)
    """Instructions drawn under policy `weights`; null, or more than there are, ends when the first part is used up."""

    @model_validator(mode="after")
    def _consistent(self) -> MixtureSource:
        for number, part in enumerate(self.parts):
            if (part.weight is None) == (self.policy == "weights"):
                raise ValueError(f"parts.{number}.weight={part.weight} with policy={self.policy}: weights go with policy weights, one each")
        if self.rows is not None and self.policy != "weights":
            raise ValueError(f"rows={self.rows} goes with policy weights, not {self.policy}; use `limit` of a source")
        return self


Source = Annotated[BigBenchSource | FilesSource | HubSource | MixtureSource, Field(discriminator="kind")]


class DecontaminationConfig(Section):
    """Evaluation rows that train instructions must not overlap with."""

    files: tuple[str, ...] = ()
    """Files, folders or globs of evaluation rows, in any format of `source.format`; none leaves the train rows as they are."""
    n: int = Field(13, ge=2, le=64)
    """Words in a row that count as overlap (lower-cased, alphanumeric); texts with fewer words overlap when all are equal."""
