"""Label functions of a user, for tests: `tests.generation.user_labels:NAME`."""

from __future__ import annotations

VERSION = "1.2"


def share_of_digits(responses: list[str], references: list[list[str]]) -> list[float]:
    """Return the share of digits in each response."""
    return [sum(map(str.isdigit, text)) / max(len(text), 1) for text in responses]


def is_named(responses: list[str], references: list[list[str]], instructions: list[str]) -> list[bool]:
    """Return whether the first reference, or a word of the instruction, is in each response."""
    return [
        any(word in text for word in [correct[0], *instruction.split()])
        for text, correct, instruction in zip(responses, references, instructions, strict=True)
    ]


def fails_on_three(responses: list[str], references: list[list[str]], instructions: list[str]) -> list[float]:
    """Label all responses 0.5; raise for a batch with an instruction that ends with 3."""
    if any(instruction.endswith("3") for instruction in instructions):
        raise KeyError("no test for 3")
    return [0.5] * len(responses)


def not_a_number(responses: list[str], references: list[list[str]]) -> list[float]:
    return [float("nan")] * len(responses)


def too_large(responses: list[str], references: list[list[str]]) -> list[float]:
    return [1.5] * len(responses)


def one_label(responses: list[str], references: list[list[str]]) -> list[float]:
    return [1.0]


def nothing(responses: list[str], references: list[list[str]]) -> None:
    return None


def exits(responses: list[str], references: list[list[str]]) -> list[float]:
    raise SystemExit(3)


def wrong_parameters(response: str) -> float:
    return 1.0


is_named.VERSION = 7  # type: ignore[attr-defined]
