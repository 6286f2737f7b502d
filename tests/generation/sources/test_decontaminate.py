import pytest

from generation.sources.decontaminate import NgramIndex
from generation.sources.row import Instruction, dead_letter

RUN = "a b c d e f g h i j k l m"


def rows(*texts):
    return [Instruction("d", None, "train", text, ("x",)) for text in texts]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (RUN, RUN),
        (f"Before it: {RUN.upper().replace(' ', ', ')}. And after.", RUN),
        (RUN.removesuffix(" m"), None),
        (RUN.replace("g", "G g"), None),
        ("Short text!", "short text"),
        ("A short text", None),
        ("", None),
    ],
)
def test_a_shared_13_gram_overlaps_and_a_shorter_text_only_as_a_whole(text, words):
    found = NgramIndex([("e.jsonl", rows(f"x {RUN} y", "short text"))], 13).find_overlap(text)
    assert found == (("e.jsonl", words) if words else None)


def test_n_is_configurable_and_the_first_file_with_the_ngram_is_returned():
    index = NgramIndex([("one", rows("the red fox")), ("two", rows("a red fox", "the red fox sleeps"))], 3)
    assert index.find_overlap("see the red fox") == ("one", "the red fox")
    assert index.find_overlap("a red fox!") == ("two", "a red fox") and index.find_overlap("red fox") is None


def test_an_empty_index_has_no_overlap():
    assert NgramIndex([], 13).find_overlap(RUN) is None
    assert NgramIndex([("e", [])], 13).report()["files"] == [{"file": "e", "rows": 0, "unreadable": 0}]


def test_the_report_counts_overlapping_rows_by_dataset_and_file():
    index = NgramIndex([("e", rows(RUN))], 13)
    assert [index.check_row(row) for row in rows(RUN, "other", f"{RUN} n")] == [True, False, True]
    report = index.report()
    assert (report["train_rows_checked"], report["train_rows_left_out"], report["datasets"]) == (3, 2, {"d": {"e": 2}})
    assert report["examples"][1] == {"dataset": "d", "file": "e", "words": RUN, "instruction": f"{RUN} n"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": f"Read: {RUN}!", "label": 3},
        {"turns": [{"text": f"x {RUN}"}]},
        {"question": f'the "{RUN}" é'},
        {"question": f"{RUN} é\n" + "long " * 200},
        f'{{"question": "{RUN}", ',
        f"{RUN}\n",
    ],
)
def test_the_texts_of_an_evaluation_row_that_cannot_be_read_are_compared_and_the_row_is_counted(row):
    index = NgramIndex([("e", [*rows("other"), dead_letter("e:2", "no references", row)])], 13)
    assert index.find_overlap(f"see {RUN}") == ("e", RUN)
    assert index.report()["files"] == [{"file": "e", "rows": 1, "unreadable": 1}] and index.report()["unreadable_rows"] == 1
    assert index.first_unreadable.where == "e:2"


def test_a_short_text_of_an_unreadable_row_overlaps_only_with_an_equal_text():
    index = NgramIndex([("e", [dead_letter("e:1", "bad", {"prompt": "Où est la ville ?"})])], 13)
    assert index.find_overlap("où est la ville") and index.find_overlap("où est la ville de X") is None
