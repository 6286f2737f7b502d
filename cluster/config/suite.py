"""Settings of `suite`: an evaluation over many tasks, run by `cappy evaluate`. Reads no file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cluster.config.base import Section


class Question(Section):
    """One question of a suite of kind `questions`."""

    instruction: str = Field(min_length=1)
    """The question."""
    right: str = Field(min_length=1)
    """The right answer."""
    wrong: tuple[str, ...] = Field(min_length=1)
    """Wrong answers."""

    @model_validator(mode="after")
    def _distinct(self) -> Question:
        if len({self.right, *self.wrong}) != 1 + len(self.wrong):
            raise ValueError(f"right={self.right!r} or a wrong answer occurs twice; give distinct answers")
        return self


class SuiteConfig(Section):
    """An evaluation over many tasks. The other sections of the config have its source, LLM and scorers."""

    kind: Literal["sampled", "choices", "questions"] = "sampled"
    """`sampled` selects among candidates of the LLM: it generates them once, and adapts a scorer in each fold. `choices` selects among
    the `answer_choices` of the source. `questions` selects among the answers in `suite.questions`."""
    folds: int = Field(3, ge=2, le=20)
    """Number of parts into which the rows of a task are dealt by a hash of their id. Each part is once the validation part, with the
    other parts as train rows. Every row is reported with scorers that were trained without it. Only with kind `sampled`."""
    adapted: bool = True
    """Adapt a scorer to each task in each fold. With false only zero-shot scorers are compared. Only with kind `sampled`."""
    rows: int | None = Field(None, ge=1)
    """Largest number of rows of a dataset. Whole examples are drawn by a hash of `seed` and the example, so all templates of an example
    stay together. null takes all rows. Only with kind `choices`."""
    likelihood: bool = True
    """Compare with the LLM's likelihood of each choice: the sum, the mean per token, and the sum relative to a neutral prompt. Only with
    kinds `choices` and `questions`."""
    neutral_prompt: str = Field("Answer:", min_length=1)
    """The prompt of the unconditional likelihood: log p(choice | instruction) - log p(choice | neutral_prompt)."""
    rivals: tuple[Literal["gptscore", "flipped", "judge", "embedding"], ...] = ()
    """Methods of other papers to compare with. `gptscore` is the LLM's likelihood of a response after a request for a right answer.
    `flipped` is its likelihood of the instruction after a response, and `judge` its verdict on a response. `embedding` is the mean
    similarity to the other candidates; only with kind `sampled`."""
    scorers: tuple[str, ...] = ()
    """More scorers to compare with, zero-shot: folders, hub names of public reward models, or s3:// folders."""
    pool_sizes: tuple[int, ...] = Field((1, 2, 4, 8, 16), min_length=1)
    """Numbers of candidates for which gain, sampled tokens and time are reported. A pool has the greedy candidate first, then the other
    candidates in the order in which a server samples them. Only with kind `sampled`."""
    min_gains: tuple[float, ...] = (0.003, 0.01, 0.03)
    """Values of `serving.adaptive.min_gain` for which early stopping is replayed over the largest pool, with the other settings of
    `serving.adaptive`. Only with kind `sampled`."""
    paper: dict[str, float] = Field(default_factory=dict)
    """Published figures by dataset, in points, for a column beside the measured ones."""
    questions: dict[str, tuple[Question, ...]] = Field(default_factory=dict)
    """The questions by group. Only with kind `questions`."""

    @model_validator(mode="after")
    def _consistent(self) -> SuiteConfig:
        names = [uri.rstrip("/").rsplit("/", 1)[-1] for uri in self.scorers]
        if repeated := [each for each in names if names.count(each) > 1]:
            raise ValueError(
                f"scorers={list(self.scorers)}: two of them end in {repeated[0]}, and the report names a scorer by the last part of its "
                f"path; copy one to a folder with another name"
            )
        if (self.kind == "questions") != bool(self.questions):
            raise ValueError(f"kind={self.kind} with {len(self.questions)} groups of questions: give questions with kind=questions only")
        if "embedding" in self.rivals and self.kind != "sampled":
            raise ValueError(f"rivals={list(self.rivals)} with kind={self.kind}: embedding compares sampled candidates; leave it out")
        if any(size < 1 for size in self.pool_sizes):
            raise ValueError(f"pool_sizes={list(self.pool_sizes)}: give numbers of candidates, from 1")
        if any(gain <= 0 for gain in self.min_gains):
            raise ValueError(f"min_gains={list(self.min_gains)}: give numbers above 0")
        return self
