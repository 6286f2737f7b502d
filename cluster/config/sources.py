"""Settings of `source` and `decontaminate`: the origin of the instructions. Reads no file."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from cluster.config.base import ExtendedSection, Section

# The eight BIG-bench generation tasks of the demo and of the defaults.
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
    """BIG-bench generation tasks from the PyPI sdist `bigbench==1.0.0`, rendered zero-shot."""

    kind: Literal["bigbench"] = "bigbench"
    """Selects BIG-bench."""
    tasks: tuple[str, ...] = Field(DEMO_TASKS, min_length=1)
    """Task names, e.g. `tense`. A task with subtasks includes all of them."""
    train_rows: int | None = Field(None, ge=1)
    """Largest number of train instructions per task; null takes all."""
    validation_rows: int | None = Field(None, ge=1)
    """Largest number of validation instructions per task; null takes all."""
    limit: int | None = Field(None, ge=1)
    """Take only this many instructions, from the start; null takes all."""


class RowsSource(ExtendedSection):
    """Settings that files and hub datasets share: the format of the rows, and the split."""

    added: ClassVar[tuple[str, ...]] = ("max_instruction_chars", "dataset_rows", "choice_rows")

    format: Literal["auto", "cappy", "p3", "promptsource", "natural-instructions", "bigbench", "alpaca", "chat"] = "auto"
    """Format of the rows. `auto` detects it from the keys of each row, and `promptsource` from `templates`. `alpaca` has the columns of a
    question and its answer in many layouts, and `chat` the turns of OpenAI or ShareGPT."""
    templates: str | None = None
    """A PromptSource `templates.yaml` for raw rows, local or s3://. Each template makes one row of a raw row. A template that uses a
    missing or null column, or a label outside its choices, makes a dead letter."""
    dataset: str | None = Field(None, min_length=1)
    """Dataset name of all rows; null takes the name in the row, else the name of the file or hub dataset."""
    limit: int | None = Field(None, ge=1)
    """Take only this many instructions, from the start; null takes all."""
    train_rows: int | None = Field(None, ge=1)
    """Largest number of train instructions per dataset; null takes all."""
    validation_rows: int | None = Field(None, ge=1)
    """Largest number of validation instructions per dataset; null takes all."""
    max_instruction_chars: int | None = Field(None, ge=1)
    """Largest length of an instruction, in characters. Longer rows are left out and counted; null takes all."""
    dataset_rows: int | None = Field(None, ge=1)
    """Largest number of rows per dataset, selected by hash: this many rows with answer choices, and this many without. null takes all.
    A larger value takes the rows of a smaller value and more."""
    choice_rows: int | None = Field(None, ge=1)
    """As `dataset_rows`, for the rows with answer choices only; null takes `dataset_rows`."""
    validation_fraction: float = Field(0.2, ge=0, lt=1)
    """Share of the examples (or datasets) without a `split` that is assigned to validation, by hash."""
    split_by: Literal["example", "dataset"] = "example"
    """Unit of the split: all instructions of an `example`, or of a whole `dataset`, are in the same split."""

    @model_validator(mode="after")
    def _templates_need_raw_rows(self) -> RowsSource:
        if (self.format == "promptsource") != (self.templates is not None) and self.format != "auto":
            raise ValueError(
                f"format={self.format} with templates={self.templates}: use templates with format=promptsource or format=auto, "
                f"and give templates for format=promptsource"
            )
        return self


class FilesSource(RowsSource):
    """Your own files, in one of the formats of `format`: JSONL, JSON, CSV or TSV with a header row, Parquet, or Arrow.

    JSON and CSV files can be compressed (.gz, .bz2, .zst, .lz4).
    """

    kind: Literal["files"] = "files"
    """Selects files."""
    path: str = Field(min_length=1)
    """A file, a glob (`data/*.jsonl`) or a folder, local or s3://. A path that exists is not a glob, also with `[` in its name. Hidden
    and temporary files in a folder are skipped. Files named `train`, `validation` or `test` decide the split of their rows, if a folder
    has several of these. The rows of test files become validation rows."""


class HubSource(RowsSource):
    """A Hugging Face dataset, streamed. Code of the dataset is never run."""

    added: ClassVar = (*RowsSource.added, "data_dir")

    kind: Literal["hub"] = "hub"
    """Selects a hub dataset."""
    name: str = Field(min_length=1)
    """`owner/name`, or a local folder in hub layout or of `save_to_disk`."""
    subset: str | None = None
    """Configuration of the dataset, if it has several."""
    split: str = "train"
    """Split of the dataset to read. `validation_fraction` divides its rows into train and validation."""
    revision: str | None = Field(None, pattern=r"^[0-9a-f]{40}$")
    """Commit to read, 40 hex digits. Required for `owner/name`, not for a local folder."""
    data_dir: str | None = Field(None, min_length=1)
    """Folder of the dataset to read, with one folder for each split; null reads the files named by its card or layout."""

    @model_validator(mode="after")
    def _subset_or_folder(self) -> HubSource:
        if self.subset is not None and self.data_dir is not None:
            raise ValueError(f"subset={self.subset} with data_dir={self.data_dir}: each selects the files to read; leave one out")
        return self


PlainSource = Annotated[BigBenchSource | FilesSource | HubSource, Field(discriminator="kind")]


class MixturePart(Section):
    """One source of a mixture."""

    name: str | None = None
    """Name of the part in the counts; null takes a name from the source."""
    source: PlainSource
    """The source of this part."""
    weight: float | None = Field(None, gt=0)
    """Share of the part in the mixture, relative to the other weights. Only with policy `weights`."""


class MixtureSource(Section):
    """Several sources, combined."""

    kind: Literal["mixture"] = "mixture"
    """Selects a mixture."""
    parts: tuple[MixturePart, ...] = Field(min_length=1)
    """The sources of the mixture, in order."""
    policy: Literal["concatenate", "t0", "weights"] = "concatenate"
    """`concatenate` takes all rows. `t0` takes at most `cap` / (number of templates) rows of each template of a dataset, as T0.
    `weights` draws rows without replacement, in the ratio of the weights, evenly mixed."""
    cap: int = Field(500_000, ge=1)
    """Largest number of instructions per dataset, with policy `t0`."""
    rows: int | None = Field(None, ge=1)
    """Instructions to draw, with policy `weights`. null, or more than available, stops at the end of the first exhausted part."""

    @model_validator(mode="after")
    def _consistent(self) -> MixtureSource:
        for number, part in enumerate(self.parts):
            if (part.weight is None) == (self.policy == "weights"):
                raise ValueError(
                    f"parts.{number}.weight={part.weight} with policy={self.policy}: give each part a weight with policy=weights, "
                    f"and no weight with another policy"
                )
        if self.rows is not None and self.policy != "weights":
            raise ValueError(f"rows={self.rows} needs policy=weights, not {self.policy}; use `limit` of a source")
        return self


Source = Annotated[BigBenchSource | FilesSource | HubSource | MixtureSource, Field(discriminator="kind")]


class DecontaminationConfig(Section):
    """Evaluation rows. Train instructions that overlap with them are removed."""

    files: tuple[str, ...] = ()
    """Files, folders or globs of evaluation rows, in a format of `source.format`. Without any, no train row is removed."""
    n: int = Field(13, ge=2, le=64)
    """Length of an overlap, in consecutive words (lower case, alphanumeric). Texts with fewer words overlap if all words are equal."""
