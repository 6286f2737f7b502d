from generation.prompts import drop_first_shot, messages, prompt_text, raw_text

SHOT = {"instruction": "\nQ: 1 + 1\nA: ", "response": " 2"}


def test_shots_are_earlier_turns():
    turns = messages("\nQ: 2 + 2\nA: ", [SHOT], system="Add.")
    assert [(turn["role"], turn["content"]) for turn in turns] == [
        ("system", "Add."),
        ("user", "Q: 1 + 1\nA:"),
        ("assistant", "2"),
        ("user", "Q: 2 + 2\nA:"),
    ]


def test_raw_text_puts_the_response_after_a_cue_and_never_ends_in_a_space():
    assert raw_text(messages("\nQ: 2 + 2\nA: ", [SHOT], system="Add.")) == "Add.\n\nQ: 1 + 1\nA: 2\n\nQ: 2 + 2\nA:"


def test_a_verbatim_prompt_is_its_content_and_a_chat_prompt_has_no_text():
    turns = [{"role": "user", "content": " Once upon a "}]
    assert (prompt_text(turns, "verbatim"), prompt_text(turns, "raw"), prompt_text(turns, "chat")) == (
        " Once upon a ",
        "Once upon a\n",
        None,
    )


def test_raw_text_puts_the_response_on_the_next_line_without_a_cue():
    assert raw_text(messages("Name a fox.", [{"instruction": "Name a cat.", "response": "Tom"}])) == "Name a cat.\nTom\n\nName a fox.\n"


def test_the_first_shot_is_dropped_and_the_instruction_is_kept():
    turns = messages("c?", [{"instruction": "a?", "response": "a"}, {"instruction": "b?", "response": "b"}], system="s")
    shorter = drop_first_shot(turns)
    assert shorter == messages("c?", [{"instruction": "b?", "response": "b"}], system="s")
    assert drop_first_shot(drop_first_shot(shorter)) is None
