from pathlib import Path

from generation import few_shot
from generation.few_shot import Pools
from generation.sources.row import DeadLetter, Instruction
from tests.generation.sources.row_files import ROWS, files_config, write_jsonl

ODD = Path(__file__).parents[1] / "data" / "odd"


def rows_for_pools():
    return [Instruction("d", template, "train", f"{template} {n}", (f"answer {n}",)) for template in ("t", "u") for n in range(8)]


def test_shots_are_train_rows_of_the_template_and_never_the_row_itself():
    rows = rows_for_pools()
    held_out = Instruction("d", "t", "validation", "t 99", ("answer 99",))
    pools = Pools([*rows, held_out], seed=1)
    for row in [*rows, held_out]:
        shots = pools.shots(row, 3)
        assert len(shots) == 3 and row not in shots
        assert {shot.template for shot in shots} == {row.template} and held_out not in shots
    assert pools.shots(held_out, 3) == Pools(rows, seed=1).shots(held_out, 3) != Pools(rows, seed=2).shots(held_out, 3)


def test_a_small_template_takes_shots_from_its_dataset():
    lone = Instruction("d", "lone", "train", "alone", ("answer",))
    shots = Pools([*rows_for_pools(), lone], seed=1).shots(lone, 3)
    assert len(shots) == 3 and lone not in shots


def test_mismatched_references_are_from_other_rows_and_depend_only_on_the_row(tmp_path):
    config = files_config(write_jsonl(tmp_path / "d.jsonl", ROWS), "source.validation_fraction=0", "generate.mismatched=2")
    forward = {row["id"]: row for _, row in few_shot.prepare_rows(config)}
    backward_config = files_config(write_jsonl(tmp_path / "d.jsonl", ROWS), "source.validation_fraction=0", "generate.mismatched=2")
    assert {row["id"]: row for _, row in few_shot.prepare_rows(backward_config)} == forward
    for row in forward.values():
        assert len(row["mismatched"]) == 4 and not set(row["mismatched"]) & set(row["references"])


def test_a_classification_row_has_no_mismatched_references(tmp_path):
    rows = [*ROWS, {"instruction": "fox?", "references": ["yes"], "answer_choices": ["yes", "no"], "dataset": "d"}]
    row = [row for _, row in few_shot.prepare_rows(files_config(write_jsonl(tmp_path / "d.jsonl", rows)))][-1]
    assert row["answer_choices"] == ["yes", "no"] and row["mismatched"] == []


def test_hard_mismatched_references_are_distinct_wrong_references_of_the_template(tmp_path):
    rows = [{**row, "template": f"t{n % 2}", "references": [f"t{n % 2} {n}"]} for n, row in enumerate(ROWS)]
    config = files_config(write_jsonl(tmp_path / "d.jsonl", rows), "generate.mismatched=1", "generate.hard_mismatched=2")
    for _, row in few_shot.prepare_rows(config):
        assert len(row["mismatched"]) == len({*row["mismatched"], *row["references"]}) - 1 == 3
        assert {text.split()[0] for text in row["mismatched"][1:]} == {row["template"]}


def test_no_instruction_is_in_both_splits_even_if_the_rows_set_it(tmp_path):
    rows = [{**row, "split": split} for row in ROWS for split in ("train", "validation")]
    found = list(
        few_shot.prepare_rows(
            files_config(write_jsonl(tmp_path / "d.jsonl", [*rows, {"instruction": "own", "references": ["x"], "split": "train"}]))
        )
    )
    letters = [each for each in found if isinstance(each, DeadLetter)]
    sides = [split for split, _ in (each for each in found if not isinstance(each, DeadLetter))]
    assert sides == ["validation"] * 40 + ["train"] and len(letters) == 40
    assert letters[0].reason == "the same instruction is in the validation split"


def test_the_most_similar_shot_is_last_and_no_shot_is_the_row_itself():
    texts = ["the cat sat on the mat", "a dog ran in the park", "the cat ran on the mat", "stock prices fell today"]
    rows = [Instruction("d", "t", "train", text, (text,)) for text in texts]
    pools = Pools([*rows, rows[0]], seed=1)
    assert [shot.instruction for shot in pools.shots(rows[0], 2, "similarity")] == [texts[1], texts[2]]
    question = Instruction("d", "t", "validation", "why did stock prices fall?", ("x",))
    assert pools.shots(question, 1, "similarity")[-1] == rows[3]
    assert pools.shots(question, 0, "similarity") == []


def test_train_rows_that_overlap_evaluation_rows_are_left_out_and_reported(tmp_path):
    shared = "one two three four five six seven eight nine ten eleven twelve thirteen"
    (tmp_path / "eval").mkdir()
    evaluation = write_jsonl(tmp_path / "eval" / "e.jsonl", [{"prompt": f"Read: {shared}!", "completion": "x"}])
    leaky = [
        {"instruction": f"{split} {shared.title()} again", "references": ["x"], "dataset": "d", "split": split}
        for split in ("train", "validation")
    ]
    config = files_config(
        write_jsonl(tmp_path / "d.jsonl", [*ROWS, *leaky]), f"decontaminate.files=['{evaluation}']", "sampler.prompt.shots=3"
    )
    report = few_shot.load_contamination(config)
    rows = [row for _, row in few_shot.prepare_rows(config, report)]
    assert [row["instruction"] for row in rows if shared.title() in row["instruction"]] == [leaky[1]["instruction"]]
    assert report.report()["datasets"] == {"d": {str(evaluation): 1}} and report.left_out == 1
    assert report.report()["examples"][0]["words"] == shared


def test_an_evaluation_row_that_cannot_be_read_is_counted_warned_about_and_compared(tmp_path, capsys):
    bad = {"question_text": "Which city is the capital of France and largest?", "gold": 3}
    evaluation = write_jsonl(tmp_path / "e.jsonl", [bad, {"instruction": "q", "references": ["z"]}])
    config = files_config(ODD / "train_cont.jsonl", f"decontaminate.files=['{evaluation}']")
    index = few_shot.load_contamination(config)
    assert [row["instruction"] for _, row in few_shot.prepare_rows(config, index)] == ["other"]
    assert (index.left_out, index.report()["unreadable_rows"]) == (1, 1)
    assert "1 evaluation rows cannot be read" in capsys.readouterr().err.replace("\n", " ")


def test_the_odd_evaluation_file_leaves_no_train_row_that_overlaps():
    config = files_config(ODD / "train_cont.jsonl", f"decontaminate.files=['{ODD}/evalset2.jsonl']")
    assert [row["instruction"] for _, row in few_shot.prepare_rows(config)] == ["other"]
