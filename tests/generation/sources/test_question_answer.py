import pytest

from generation.sources import formats
from generation.sources.row import DeadLetter

LAYOUTS = {
    "alpaca": ({"instruction": "Sort.", "input": "3 1", "output": "1 3"}, "Sort.\n\n3 1", ["1 3"]),
    "alpaca, several answers": ({"instruction": "x", "input": "", "output": ["a", "b"]}, "x", ["a", "b"]),
    "alpaca, list": ({"instruction": "y", "input": ["p", "q"], "output": "z"}, "y\n\np\nq", ["z"]),
    "alpaca, number": ({"instruction": "w", "input": 5, "output": "z"}, "w\n\n5", ["z"]),
    "alpaca, system and history": (
        {"system": "In French", "instruction": "Say cat", "input": "", "output": "chat", "history": [["a", "b"]]},
        "In French\n\nUser: a\n\nAssistant: b\n\nUser: Say cat",
        ["chat"],
    ),
    "history of turns": (
        {"instruction": "x", "output": "y", "history": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        "User: a\n\nAssistant: b\n\nUser: x",
        ["y"],
    ),
    "no history": ({"instruction": "x", "output": "y", "history": [], "system": ""}, "x", ["y"]),
    "dolly": ({"instruction": "Who?", "context": "Bob did it.", "response": "Bob"}, "Who?\n\nBob did it.", ["Bob"]),
    "question and context": ({"question": "Who?", "answer": "Bob", "context": "Bob did it."}, "Who?\n\nBob did it.", ["Bob"]),
    "orca": ({"system_prompt": "You are X", "question": "q?", "response": "a"}, "You are X\n\nq?", ["a"]),
    "squad": ({"question": "q", "context": "c", "answers": {"text": ["a", "b"], "answer_start": [1, 2]}}, "q\n\nc", ["a", "b"]),
    "trl": ({"prompt": "q", "completion": "a"}, "q", ["a"]),
    "trl, turns": (
        {
            "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
            "completion": [{"role": "assistant", "content": "a"}],
        },
        "s\n\nq",
        ["a"],
    ),
    "prompt and response": ({"prompt": "q", "response": "a"}, "q", ["a"]),
    "input and output": ({"input": "q", "output": "a"}, "q", ["a"]),
    "numbers": ({"question": 7, "answer": 4}, "7", ["4"]),
    "number zero": ({"question": "1-1", "answer": 0}, "1-1", ["0"]),
    "natural instructions, one row": ({"definition": "Add.", "inputs": "1 1", "targets": "2"}, "Add.\n\n1 1", ["2"]),
    "null columns of another layout": ({"instruction": None, "output": None, "question": "q", "answer": "a"}, "q", ["a"]),
    "choices": ({"question": "q", "answer": "b", "choices": ["a", "b"]}, "q", ["b"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_all_fields_of_a_common_layout_get_into_the_row(name):
    raw, instruction, references = LAYOUTS[name]
    ((_, row),) = formats.convert_row("f:1", raw, "auto")
    assert (row["instruction"], row["references"]) == (instruction, references)
    assert formats.unused_fields(raw, "auto") <= {"choices"}


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ({"instruction": "x", "input": {"a": 1}, "output": "y"}, "`input` is a dict; it must be text"),
        ({"instruction": ["x"], "output": "y"}, "`instruction` must be a list of turns"),
        ({"instruction": "x", "output": True}, "`output` is a bool; it must be text"),
        ({"instruction": "x", "output": "y", "history": ["a"]}, "`history` must be a list of [question, answer] pairs or of turns"),
        ({"instruction": "x", "output": "y", "history": "a"}, "`history` must be a list of"),
        ({"question": "q", "answer": 1, "choices": ["a", "b"]}, "`answer` is '1', which is not in `choices`; give the text of the choice"),
        ({"question": "q", "answer": "B", "options": ["a", "b"]}, "`answer` is 'B', which is not in `options`"),
        ({"question": "q", "answers": {"start": [1]}}, "`answers` is an object with start; it must be text"),
        ({"prompt": "q", "completion": [{"role": "assistant", "content": "a"}] * 2}, "`completion` has 2 turns; one is supported"),
    ],
)
def test_a_value_that_cannot_be_rendered_is_a_dead_letter(raw, reason):
    ((_, letter),) = formats.convert_row("f:1", raw, "auto")
    assert isinstance(letter, DeadLetter) and reason in letter.reason


def test_fields_that_are_not_used_are_named():
    raw = {"question": "q", "response": "a", "id": 1, "category": "x", "empty": None, "system": "s"}
    assert formats.unused_fields(raw, "auto") == {"id", "category"}
    assert formats.unused_fields({"instruction": "x", "references": ["a"], "input": "y"}, "auto") == {"input"}
