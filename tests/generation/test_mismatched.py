import unicodedata
from pathlib import Path

import pytest

from generation import few_shot
from generation.few_shot import Pools
from generation.mismatched import draw_mismatched
from generation.sources.row import Instruction
from tests.generation.sources.row_files import files_config, write_jsonl

ODD = Path(__file__).parents[1] / "data" / "odd"


def row(instruction, *references, **fields):
    return Instruction(**{"dataset": "d", "template": None, "split": "train", **fields}, instruction=instruction, references=references)


def drawn_for(own, others, tmp_path, *overrides):
    """Return the mismatched references of a row whose pool has the other rows."""
    config = files_config(tmp_path, "generate.mismatched=8", *overrides)
    pools = Pools([own, *others], config.seed)
    return draw_mismatched([own], lambda each: [(pools.dataset(each), config.generate.mismatched)], config)[0]


@pytest.mark.parametrize(
    ("reference", "other"),
    [
        ("Yes", "Yes."),
        ("yes", "YES!"),
        ("Yes", " Yes "),
        ("the cat", "The cats"),
        (unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")),
        ("ﬁne", "fine"),
        ("北京市", "北京市。"),
        ("２０", "20"),
    ],
)
@pytest.mark.parametrize("metric", ["rouge_l", "exact_match"])
def test_a_response_that_equals_a_reference_apart_from_its_spelling_is_not_drawn(reference, other, metric, tmp_path):
    others = [row("other", other), row("third", "something else")]
    assert drawn_for(row("own", reference), others, tmp_path, f"generate.label.metric={metric}") == ["something else"]


def test_a_response_that_only_the_configured_metric_scores_1_is_not_drawn(tmp_path):
    others = [row("other", "fox red"), row("third", "something else")]
    own = row("own", "red fox")
    assert drawn_for(own, others, tmp_path, "generate.label.metric=token_f1") == ["something else"]
    assert set(drawn_for(own, others, tmp_path)) == {"fox red", "something else"}


@pytest.mark.parametrize("same", ["Name a prime", "name  a PRIME ", unicodedata.normalize("NFKC", "Name a ｐrime")])
def test_an_answer_of_another_row_with_the_same_instruction_is_not_drawn(same, tmp_path):
    others = [row(same, "11", template="t"), row("Name a colour", "red")]
    assert drawn_for(row("Name a prime", "7"), others, tmp_path) == ["red"]


def test_right_answers_of_the_instruction_are_not_drawn_from_other_instructions(tmp_path):
    rows = [
        {"instruction": "Name a prime", "references": ["7"], "template": "a"},
        {"instruction": "Name a prime", "references": ["11"], "template": "b"},
        {"instruction": "Name a number above 10", "references": ["11"], "template": "a"},
        {"instruction": "Name a colour", "references": ["red"], "template": "a"},
    ]
    path = write_jsonl(tmp_path / "d.jsonl", [{**each, "split": "train", "dataset": "d"} for each in rows])
    config = files_config(path, "generate.mismatched=8")
    found = {(each["instruction"], each["template"]): set(each["mismatched"]) for _, each in few_shot.prepare_rows(config)}
    assert found["Name a prime", "a"] == found["Name a prime", "b"] == {"red"}
    assert found["Name a number above 10", "a"] == {"7", "red"}


@pytest.mark.parametrize("name", ["mm_same_q.jsonl", "sni_two_outputs.json"])
def test_odd_inputs_with_several_right_answers_have_no_mismatched_reference(name):
    config = files_config(ODD / name, "generate.mismatched=4")
    ((_, only),) = few_shot.prepare_rows(config)
    assert len(only["references"]) in (2, 3) and only["mismatched"] == []


def test_each_row_keeps_its_draws_if_nothing_is_refused(tmp_path):
    rows = [row(f"say {n}", f"answer {n}") for n in range(300)]
    config = files_config(tmp_path, "generate.mismatched=2", "generate.hard_mismatched=1")
    pools = Pools(rows, config.seed)

    def sources(each):
        return [(pools.dataset(each), 2), (pools.template(each), 1)]

    together = draw_mismatched(rows, sources, config)
    assert [draw_mismatched([each], sources, config)[0] for each in rows[:20]] == together[:20]
    assert all(len(each) == len(set(each)) == 3 for each in together)
