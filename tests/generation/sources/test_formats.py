from collections import Counter

import pytest

from generation.sources import bigbench, formats
from generation.sources.row import DeadLetter

TASK = {
    "Definition": ["Add the numbers."],
    "Positive Examples": [{"input": "1 2", "output": "3", "explanation": ""}],
    "Instances": [{"id": "a", "input": "2 2", "output": ["4", "four"]}],
}
BENCH = {
    "name": "sums",
    "task_prefix": "Add.",
    "examples": [{"input": "1+1", "target": ["2", "two"]}, {"input": "2+2", "target_scores": {"4": 1, "5": 0, "6": 0}}],
}
CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": [{"type": "text", "text": "Bye"}]},
    {"role": "assistant", "content": "Goodbye"},
]
ROWS = [
    ("cappy", {"instruction": "x", "references": ["a"]}, [("x", ["a"], None)]),
    ("cappy", {"instruction": "x", "references": '["a", "b"]'}, [("x", ['["a", "b"]'], None)]),
    ("cappy", {"instruction": "x", "references": ["a", None, float("nan")]}, [("x", ["a"], None)]),
    ("cappy", {"instruction": "x", "references": ["a"], "answer_choices": "a ||| b"}, [("x", ["a"], ["a", "b"])]),
    ("p3", {"inputs_pretokenized": "x", "targets_pretokenized": "a", "inputs": [3], "targets": [4]}, [("x", ["a"], None)]),
    ("p3", {"inputs_pretokenized": "x", "targets_pretokenized": "a", "answer_choices": ["a", "b"]}, [("x", ["a"], ["a", "b"])]),
    (
        "natural-instructions",
        TASK,
        [
            ("Definition: Add the numbers.\n\nNow complete the following example -\nInput: 1 2\nOutput: ", ["3"], None),
            ("Definition: Add the numbers.\n\nNow complete the following example -\nInput: 2 2\nOutput: ", ["4", "four"], None),
        ],
    ),
    ("alpaca", {"instruction": "Sort.", "input": "3 1", "output": "1 3"}, [("Sort.\n\n3 1", ["1 3"], None)]),
    ("alpaca", {"instruction": "Sort.", "input": "", "output": "1 3"}, [("Sort.", ["1 3"], None)]),
    ("alpaca", {"inputs": "q", "targets": "a", "split": "other"}, [("q", ["a"], None)]),
    ("alpaca", {"prompt": "q", "completion": "a"}, [("q", ["a"], None)]),
    ("alpaca", {"question": "q", "answer": "a"}, [("q", ["a"], None)]),
    ("chat", {"messages": CHAT[:2]}, [("Hi", ["Hello"], None)]),
    ("chat", {"messages": CHAT[:3]}, [("Hi", ["Hello"], None)]),
    ("chat", {"messages": CHAT}, [("User: Hi\n\nAssistant: Hello\n\nUser: Bye", ["Goodbye"], None)]),
    ("chat", {"messages": [{"role": "system", "content": "Be brief."}, *CHAT[:2]]}, [("Be brief.\n\nHi", ["Hello"], None)]),
]


@pytest.mark.parametrize(("name", "raw", "expected"), ROWS)
def test_a_row_is_converted_by_the_format_that_its_keys_show(name, raw, expected):
    assert formats.detect_format(raw) == name
    rows = [row for _, row in formats.convert_row("f:1", raw, "auto")]
    assert [(row["instruction"], row["references"], row.get("answer_choices")) for row in rows] == expected
    assert all(row.get("split") in (None, "train") for row in rows)


def test_positive_examples_are_train_rows_and_instances_are_split_by_their_input():
    positive, instance = (row for _, row in formats.convert_row("f", TASK, "auto"))
    assert positive["split"] == "train" and (instance["split"], instance["example"]) == (None, "2 2")


def test_a_bigbench_task_gives_examples_with_a_target_and_then_classification_rows():
    (_, target), (location, choice) = formats.convert_row("task.json", BENCH, "auto")
    assert target == {"dataset": "sums", "instruction": "Add.\nQ: 1+1\nA: ", "references": ["2", "two"]}
    assert location == "task.json#2" and choice["references"] == ["4"] and sorted(choice["answer_choices"]) == ["4", "5", "6"]
    listed = "".join(f"\n  choice: {text}" for text in choice["answer_choices"])
    assert choice["instruction"] == f"Add.\nQ: 2+2{listed}\nA: "


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        ({"input": "2+2", "target": 4}, ["4"]),
        ({"input": "2-2", "target": 0}, ["0"]),
        ({"input": 7, "target": ["7", 7.5]}, ["7", "7.5"]),
        ({"input": "x", "target_scores": {"a": 0, "b": 0}}, "`target_scores` gives no choice a score above 0"),
        ({"input": "x", "target_scores": {"a": -1, "b": float("nan")}}, "`target_scores` gives no choice a score above 0"),
        ({"input": "x", "target_scores": {"a": "1"}}, "`target_scores` gives no choice a score above 0"),
        ({"input": "x", "target_scores": {}}, "the example has no `target` and no `target_scores`"),
        ({"input": "x", "target": ["", " "]}, "the example has no `target` and no `target_scores`"),
        ({"input": "x"}, "the example has no `target` and no `target_scores`"),
        ({"target": "x"}, "the example has no `input`"),
        ({"input": ["x"], "target": "x"}, "`input` is a list; it must be text"),
        ({"input": "x", "target": True}, "`target` is a bool; it must be text"),
    ],
)
def test_a_bigbench_example_has_numbers_as_text_or_is_a_dead_letter(example, expected):
    ((_, row),) = formats.convert_row("task.json", {"examples": [example], "task_prefix": None}, "auto")
    if isinstance(expected, str):
        assert isinstance(row, DeadLetter) and row.reason == f"{expected} (format bigbench)" and row.where == "task.json#1"
    else:
        assert (row["instruction"], row["references"]) == (f"\nQ: {example['input']}\nA: ", expected)


def test_an_instance_of_natural_instructions_has_numbers_as_text_or_is_a_dead_letter():
    instances = [{"input": 5, "output": 6}, {"input": "x", "output": []}, {"output": ["y"]}, "z", {"input": "x", "output": [None, "y"]}]
    rows = [row for _, row in formats.convert_row("f", {"Definition": "D", "Instances": instances}, "auto")]
    assert [row["references"] for row in rows if not isinstance(row, DeadLetter)] == [["6"], ["y"]]
    assert [row.reason.removesuffix(" (format natural-instructions)") for row in rows if isinstance(row, DeadLetter)] == [
        "an item of `Instances` has no `output`",
        "an item of `Instances` has no `input`",
        "an item of `Instances` is a str; it must have `input` and `output`",
    ]


@pytest.mark.parametrize(
    ("choices", "expected"),
    [([], None), ("Yes ||| No", ["Yes", "No"]), (["Yes ||| No"], ["Yes", "No"]), (["a", "b"], ["a", "b"]), (None, None)],
)
def test_choices_of_p3_are_null_a_text_with_separators_or_a_list(choices, expected):
    raw = {"inputs_pretokenized": "x", "targets_pretokenized": "Yes", "answer_choices": choices}
    ((_, row),) = formats.convert_row("f", raw, "auto")
    assert row.get("answer_choices") == expected


@pytest.mark.parametrize(("word", "split"), [("test", "validation"), ("Dev", "validation"), ("train", "train"), ("other", None)])
def test_rows_of_a_test_split_are_not_train_rows(word, split):
    ((_, row),) = formats.convert_row("f", {"question": "q", "answer": "a", "split": word}, "auto")
    assert row.get("split") == split


def test_false_in_a_csv_cell_is_not_a_correct_choice():
    rows = [
        {"idx": [0, n], "inputs_pretokenized": "q", "targets_pretokenized": text, "is_correct": right}
        for n, (text, right) in enumerate([("a", "False"), ("b", "True")])
    ]
    ((_, row),) = formats.merge_choices((("f", row) for row in rows), Counter())
    assert row["targets_pretokenized"] == ["b"]


def test_the_correct_choice_has_a_random_position():
    examples = [{"input": f"{n}", "target_scores": {"right": 1, "wrong": 0}} for n in range(100)]
    first = [row["answer_choices"][0] for row in bigbench.render_choices("", {"examples": examples})]
    assert 30 <= first.count("right") <= 70


def test_the_choices_of_one_p3_example_become_one_classification_row():
    def scored(idx, text, right):
        return {"idx": idx, "inputs_pretokenized": f"q{idx[0]}", "targets_pretokenized": text, "is_correct": right}

    raws = [scored([0, 0], "yes", True), scored([0, 1], "no", False), scored([1, 0], "yes", False), scored([1, 1], "no", True), {"a": 1}]
    counts = Counter()
    merged = list(formats.merge_choices(((f"f:{number}", raw) for number, raw in enumerate(raws)), counts))
    assert counts.total() == 2
    assert [location for location, _ in merged] == ["f:0", "f:2", "f:4"] and merged[-1][1] == {"a": 1}
    (_, row), *_ = formats.convert_row(*merged[1], "p3")
    assert (row["instruction"], row["references"], row["answer_choices"]) == ("q1", ["no"], ["yes", "no"])


BAD = [
    ({"messages": []}, "`messages` has no assistant turn"),
    ({"messages": "hi"}, "`messages` must be a list"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, {"role": "assistant", "content": "x"}]}, "user turn is not text"),
    ({"Definition": ["x"], "Instances": "none"}, "`Instances` is a str"),
    ({"examples": ["x"]}, "`examples` must be a list of objects"),
    ([1], "the row is a list"),
]


@pytest.mark.parametrize(("raw", "reason"), BAD)
def test_a_row_that_cannot_be_converted_is_a_dead_letter_with_the_reason(raw, reason):
    ((location, letter),) = formats.convert_row("f:7", raw, "auto")
    assert isinstance(letter, DeadLetter) and reason in letter.reason and location == letter.where == "f:7"


def test_a_named_format_is_not_detected():
    ((_, letter),) = formats.convert_row("f:7", {"instruction": "x", "references": ["a"]}, "p3")
    assert letter.reason == "format p3 needs 'inputs_pretokenized'; the row has instruction, references"


@pytest.mark.parametrize(
    ("row", "converted"),
    [
        ({"instruction": 7, "references": [4, 0.5, "x"]}, {"instruction": "7", "references": ["4", "0.5", "x"]}),
        ({"instruction": "a", "references": 4}, {"instruction": "a", "references": ["4"]}),
        (
            {"instruction": "a", "references": ["1"], "answer_choices": [1, 2]},
            {"instruction": "a", "references": ["1"], "answer_choices": ["1", "2"]},
        ),
        ({"instruction": "a", "references": ["b"], "split": "test"}, {"instruction": "a", "references": ["b"], "split": "validation"}),
        ({"instruction": "a", "references": ["b"], "split": "later"}, {"instruction": "a", "references": ["b"], "split": "later"}),
        ({"instruction": "a", "references": [True]}, {"instruction": "a", "references": [True]}),
    ],
)
def test_own_columns_may_hold_numbers_and_other_names_of_splits(row, converted):
    assert list(formats.convert_cappy(row)) == [converted]
