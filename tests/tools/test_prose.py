from pathlib import Path

import pytest

from tools import prose


def found(path: str, text: str) -> list[tuple[int, str]]:
    """The line and words of each finding of a file."""
    return [(finding.line, finding.word) for finding in prose.check_text(path, text)[0]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("it sleeps while nobody asks", ["sleeps", "nobody", "asks"]),
        ("Seconds between looks at whether a scorer was published.", ["looks"]),
        ("gave no sign of life; it goes on, this one stops", ["sign of life", "goes on"]),
        ("keeps `waiting` more at the door", ["at the door"]),
        ("only local paths and s3:// are known; copy the data there first", ["only local paths and s3:// are known"]),
        ("who is scored next", ["who"]),
        ("why pools grew no further", ["why"]),
        ("goes on where it was when it is given again", ["goes on"]),
        ("costs the scores of the responses it was asked for then", ["asked"]),
        ("The request wakes a replica and gives way.", ["wakes", "gives way"]),
        ("The gateway is told of the limit.", ["told"]),
        ("The set is labelled anew; mend the source and tidy the folder.", ["anew", "mend", "tidy"]),
        ("Removes those that are not used.", ["those that"]),
        ("Publishes what is left.", ["what"]),
        ("The path is no folder.", ["is no"]),
        ("Raises `CappyError` where the file is missing.", ["Raises `CappyError` where"]),
        ("Both ends are closed. What fails is sent again.", ["What"]),
        ("Which rows are taken is a function of the seed.", ["Which"]),
        ("The rows are sorted. Each takes two seconds.", ["Each takes"]),
        ("A server\nof its own answers.", ["of its own"]),
        ("Set what vLLM reads. No file is there.", ["what", "is there"]),
        (
            "Equal but for the order; 40 tokens a second, by turns, from the first look on.",
            ["but for", "tokens a second", "by turns", "from the first look on"],
        ),
    ],
)
def test_banned_words_are_found(text, words):
    assert [word for _, word in found("docs/page.md", text)] == words


@pytest.mark.parametrize(
    "text",
    [
        "0 scales the deployment to zero when idle.",
        "Interval between checks for a new scorer version, in seconds.",
        "lease lost: no heartbeat for 30 s; stopping",
        "Queues up to `waiting` requests and rejects the rest.",
        "unsupported scheme; use a local path or s3://",
        "Run the same command again to resume.",
        "If scoring fails, those responses stay unscored.",
        "There is no limit. It is no longer read.",
        "What does it cost? Which GPU is needed?",
        "And what does it cost? Is there a limit? The table shows what to change.",
        "The tokens per second of a run. Read from line 3 on the screen.",
        "Users who want more set it higher; you want 8 candidates.",
        "Call `time.sleep`, `what_is` or `ask()`; see https://example.org/what-is/asks.",
        "Each replica takes 2 GiB. One decoding of each is greedy.",
        "See [the page](guides/who-is-asked.md) and docs/who/knows.md.",
        "A well-known look-up uses the `who` column.",
        "Every unit is committed. The rest of the run is repeated.",
    ],
)
def test_plain_sentences_pass(text):
    assert found("docs/page.md", text) == []


def test_a_sentence_of_thirty_words_passes_and_one_of_thirty_one_does_not():
    assert found("docs/page.md", "word " * 29 + "word.") == []
    assert found("docs/page.md", "word " * 30 + "word.") == [(1, "31 words")]
    assert found("module.py", f'"""{"word " * 30}word."""') == [(1, "31 words")]


def test_code_links_and_numbers_with_units_count_as_single_words():
    counted = "[a b](https://example.org/one/two/three) `three four five six` https://example.org/x/y 1,000 s3://bucket/key " * 4
    assert found("docs/page.md", counted + "six more words make exactly thirty.") == []
    assert found("docs/page.md", counted + "seven more words make exactly thirty one.") == [(1, "31 words")]


def test_abbreviations_and_colons_end_no_sentence_and_paragraphs_do():
    assert found("docs/page.md", "word " * 20 + "e.g. " + "word " * 10 + "word.") == [(1, "32 words")]
    assert found("docs/page.md", "word " * 20 + "\n\n" + "word " * 20) == []
    assert found("docs/page.md", "- " + "word " * 20 + "\n- " + "word " * 20) == []
    assert found("docs/page.md", "| " + "word " * 20 + "| " + "word " * 20 + "|\n") == []


def test_markdown_code_is_skipped_and_text_after_it_is_read():
    text = "# Title\n\n```bash\nwho asks\n```\n\n    who asks\n\nText.\n\n| a | b |\n| --- | --: |\n| x | who asks |\n\n"
    text += "!!! note\n    Nobody.\n"
    assert found("docs/page.md", text) == [(13, "who"), (13, "asks"), (16, "Nobody")]


def test_docstring_sections_are_separate_sentences_and_indented_code_is_skipped():
    text = '''"""Summary.

    Args:
        first: {words}
        second (int): {words}

    Example::

        >>> who_is("who asks")

        who asks

    Raises:
        ValueError: If nobody reads it.
    """
'''.format(words="word " * 20)
    assert found("module.py", text) == [(14, "nobody")]


def test_comments_docstrings_fields_help_and_errors_of_a_module_are_read():
    text = """import typer

# The first line,
# and nobody on the second.
SIZE = 3  # asked once

class Config:
    size: int = 3
    '''The size it wants.'''

option = typer.Option(help="Ask again for the size.")

def run(x):
    raise CappyError(
        f"size={x}: the run goes on "
        "without it, told twice"
    )

DATA = {"who asks": "nobody"}
"""
    assert found("cluster/module.py", text) == [
        (4, "nobody"),
        (5, "asked"),
        (9, "wants"),
        (11, "Ask"),
        (15, "goes on"),
        (16, "told"),
    ]


def test_strings_are_read_in_the_product_and_only_messages_in_tests():
    text = 'TITLE = "the table of scores asked for"\nraise ValueError("the table of scores was asked for")\n'
    assert found("cluster/module.py", text) == [(1, "asked"), (2, "asked")]
    assert found("tests/test_module.py", text) == [(2, "asked")]


def test_names_of_tests_are_read_and_may_be_long():
    assert found("tests/test_x.py", "def test_nobody_asks(): ...\n") == [(1, "nobody"), (1, "asks")]
    assert found("tests/test_x.py", f"def test_{'_'.join(['word'] * 40)}(): ...\n") == []


def test_yaml_comments_and_page_text_are_read_and_values_are_not():
    assert found("configs/x.yaml", "# Who asks.\nkey: who asks   # told\n") == [(1, "Who"), (1, "asks"), (2, "told")]
    page = '<p class="who">\nNobody\n</p><script>\nconst who = 1; show("the server goes on with it");\n</script><style>.asks{}</style>'
    assert found("serving/page.html", page) == [(2, "Nobody"), (4, "goes on")]


def test_a_marker_with_a_reason_excepts_its_word_alone():
    text = "<!-- prose: allow who: the name of a WHO table -->\nThe table who, not what it holds.\n"
    findings, excepted = prose.check_text("docs/page.md", text)
    assert [(finding.line, finding.word) for finding in findings] == [(2, "what")]
    assert [finding.word for finding in excepted] == ["who"]


def test_a_marker_without_a_reason_or_without_use_is_a_finding():
    assert found("docs/page.md", "<!-- prose: allow who: -->\nThe table who.\n") == [(1, "prose: allow who"), (2, "who")]
    assert found("docs/page.md", "<!-- prose: allow who: a table -->\nThe table.\n") == [(1, "prose: allow who")]


def tree(folder: Path, exceptions: str = "") -> Path:
    """A folder of two pages, with an exceptions file."""
    (folder / "docs").mkdir()
    (folder / "tools").mkdir()
    (folder / "docs" / "a.md").write_text("The table who is here.\n")
    (folder / "README.md").write_text("The queue.\n")
    (folder / prose.EXCEPTIONS).write_text(exceptions)
    return folder


def test_a_listed_exception_is_counted_and_a_stale_one_is_a_finding(tmp_path):
    root = tree(tmp_path, "# reasons\ndocs/a.md | table who | the name of a table\nREADME.md | gone | no such text\n")
    findings, read, excepted = prose.run(root, [])
    assert ([str(each) for each in findings], read, excepted) == (
        ["tools/prose_exceptions.txt:3: gone -> remove this exception, it excepts nothing"],
        2,
        1,
    )


def test_an_exception_without_a_reason_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tools/prose_exceptions.txt:1: write PATH \| EXCERPT \| REASON"):
        prose.run(tree(tmp_path, "docs/a.md | table who\n"), [])


def test_only_reads_a_part_of_the_tree(tmp_path):
    root = tree(tmp_path)
    assert [(each.path, each.word) for each in prose.run(root, ["docs"])[0]] == [("docs/a.md", "who")]
    assert prose.run(root, ["README.md"])[:2] == ([], 1)


def test_the_command_prints_findings_and_a_summary_and_exits_1(capsys, monkeypatch, tmp_path):
    root = tree(tmp_path)
    monkeypatch.setattr(prose, "ROOT", root)
    assert prose.main([]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "docs/a.md:1: who -> name the actor: the client, the process, the user",
        "2 files read, 1 findings, 0 exceptions",
    ]
    assert prose.main(["--only", str(root / "README.md")]) == 0
    assert capsys.readouterr().out == "1 files read, 0 findings, 0 exceptions\n"
