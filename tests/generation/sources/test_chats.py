import pytest

from generation.sources import formats
from generation.sources.row import DeadLetter

SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]


@pytest.mark.parametrize(
    ("raw", "instruction", "reference"),
    [
        ({"conversations": SHAREGPT}, "hi", "hello"),
        ({"conversations": [{"from": "system", "value": "s"}, *SHAREGPT]}, "s\n\nhi", "hello"),
        ({"system": "s", "conversations": SHAREGPT}, "s\n\nhi", "hello"),
        ({"conversations": [*SHAREGPT, *SHAREGPT]}, "User: hi\n\nAssistant: hello\n\nUser: hi", "hello"),
        ({"conversations": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}, "hi", "hello"),
        ({"messages": None, "conversations": SHAREGPT}, "hi", "hello"),
    ],
)
def test_a_chat_of_sharegpt_gives_its_last_answer_as_the_reference(raw, instruction, reference):
    ((_, row),) = formats.convert_row("f:1", raw, "auto")
    assert not isinstance(row, DeadLetter)
    assert (row.get("instruction"), row.get("references")) == (instruction, [reference]) and not formats.unused_fields(raw, "auto")


def test_turns_after_the_last_answer_are_named_as_not_used():
    raw = {"conversations": [*SHAREGPT, SHAREGPT[0]]}
    ((_, row),) = formats.convert_row("f:1", raw, "auto")
    assert row["references"] == ["hello"] and formats.unused_fields(raw, "auto") == {"conversations, turns after the last answer"}


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ("hi", "`conversations` must be a list of turns"),
        (["hi"], "`conversations` must be a list of turns"),
        ([SHAREGPT[0]], "`conversations` has no assistant turn"),
        ([SHAREGPT[0], {"from": "gpt", "value": None}], "the content of the assistant turn is not text"),
        ([{"from": "human", "value": [{"type": "text", "text": 5}]}, SHAREGPT[1]], "the content of the user turn is not text"),
    ],
)
def test_a_chat_that_cannot_be_read_is_a_dead_letter(turns, reason):
    ((_, letter),) = formats.convert_row("f:1", {"conversations": turns}, "auto")
    assert isinstance(letter, DeadLetter) and reason in letter.reason
