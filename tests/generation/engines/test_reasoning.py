import pytest

from generation.engines.reasoning import strip_reasoning


@pytest.mark.parametrize(
    ("text", "response"),
    [
        ("a red fox", "a red fox"),
        ("<think>hm, a fox?</think>\n\nred", "red"),
        ("\n<think>\nhm\n</think>red", "red"),
        ("<THINK>hm</THINK>red", "red"),
        ("<think></think>red", "red"),
        ("<think>one</think><think>two</think>red", "red"),
        ("red <think>or blue?</think>fox", "red fox"),
        # The template put the opening mark into the prompt.
        ("hm, a fox?\n</think>\n\nred", "red"),
        # No tokens were left for an answer.
        ("<think>hm, a fox", ""),
        ("<thinking>hm</thinking>red", "red"),
        ("<reasoning>hm</reasoning>red", "red"),
        ("[THINK]hm[/THINK]red", "red"),
        ("◁think▷hm◁/think▷red", "red"),
        ("<|begin_of_thought|>hm<|end_of_thought|>red", "red"),
        # No reasoning of the model.
        ("The tag <thinking> opens a block", "The tag <thinking> opens a block"),
        ("a < b [1]", "a < b [1]"),
        ("write <think> first", "write <think> first"),
    ],
)
def test_reasoning_is_removed_and_the_answer_kept(text, response):
    assert strip_reasoning(text).strip() == response


def test_a_text_without_reasoning_is_unchanged():
    assert strip_reasoning("  a < b \n") == "  a < b \n"
