import pytest

from cluster.errors import UsageError
from generation.sources import promptsource
from generation.sources.promptsource import Template, TemplateRenderer
from generation.sources.row import DeadLetter

YAML = """
dataset: super_glue
subset: copa
templates:
  b7: !Template
    answer_choices: '{{choice1}} ||| {{choice2}}'
    id: b7
    jinja: '{{ premise }} {{ answer_choices | join(" or ") }}? ||| {{ answer_choices[label] }}'
    metadata: !TemplateMetadata
      original_task: true
    name: choose
    reference: ''
  a1: !Template
    answer_choices: null
    jinja: '{% if question == "effect" %}{{ premise }} What next? ||| {{ [choice1, choice2][label] }}{% endif %}'
    metadata: !TemplateMetadata {}
    name: effect only
"""
RAW = {"premise": "I fell|||down.", "choice1": "It hurt.", "choice2": "I flew.", "question": "cause", "label": 0}


@pytest.fixture
def templates(tmp_path):
    (tmp_path / "templates.yaml").write_text(YAML)
    return promptsource.load_templates(str(tmp_path / "templates.yaml"))


def test_each_template_gives_one_row_and_a_blank_rendering_gives_none(templates):
    name, loaded = templates
    assert name == "super_glue_copa" and [each.name for each in loaded] == ["choose", "effect only"]
    ((location, row),) = TemplateRenderer(loaded, seed=1).render_rows("f:1", RAW)
    assert location == "f:1#choose" and row == {
        "instruction": "I fell|||down. It hurt. or I flew.?",
        "references": ["It hurt."],
        "answer_choices": ["It hurt.", "I flew."],
        "template": "choose",
        "example": "I fell|||down.",
    }
    both = [row for _, row in TemplateRenderer(loaded, seed=1).render_rows("f:2", {**RAW, "question": "effect"})]
    assert [(row["template"], row["answer_choices"]) for row in both] == [("choose", ["It hurt.", "I flew."]), ("effect only", None)]


def render(template, text="some text"):
    ((_, row),) = TemplateRenderer([Template("t", template, None)], seed=1).render_rows("f:1", {"text": text})
    return row


@pytest.mark.parametrize(
    ("text", "instruction"),
    [
        ("{{ [1, 2, 2] | most_frequent | first }} ||| x", "2"),
        ("{% for a, b in zip('ab', 'cd') %}{{ loop.index }}{{ a }}{{ b }}{{ ',' if not loop.last }}{% endfor %} ||| x", "1ac,2bd"),
        ("{% for n, a in enumerate('ab') %}{{ n }}{{ a }}{% endfor %} ||| x", "0a1b"),
        ("{% set s = text.replace('some', 'a') %}{{ ', '.join(s.split()) }} ||| x", "a, text"),
        ("{% set ns = namespace(n=0) %}{% for a in 'abc' %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }} ||| x", "3"),
        ("{% macro m(a) %}<{{ a }}>{% endmacro %}{{ m(text) }} ||| x", "<some text>"),
        ("{% set b %}{{ text }}!{% endset %}{{ b | upper }} ||| x", "SOME TEXT!"),
        ("{{ missing }}q ||| x", "q"),
    ],
)
def test_functions_and_filters_of_promptsource_templates_are_supported(text, instruction):
    assert render(text)["instruction"] == instruction


def test_several_answers_are_several_references_and_the_choice_filter_is_seeded_by_the_row():
    assert render("q ||| a ||| b ||| a")["references"] == ["a", "b", "a"]
    drawn = [render("{{ range(1000) | list | choice }} ||| x", text)["instruction"] for text in "aab"]
    assert drawn[0] == drawn[1] != drawn[2]


HOSTILE = {
    "a long range": "{% for i in range(10**12) %}x{% endfor %} ||| x",
    "a loop in a loop": "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %} ||| x",
    "a macro that calls itself": "{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }} ||| x",
    "a wide macro tree": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }} ||| x",
    "a class": "{{ ''.__class__.__mro__[1].__subclasses__() }} ||| x",
    "globals": "{{ zip.__init__.__globals__ }} ||| x",
    "a format": "{{ '{0.__class__}'.format(text) }} ||| x",
    "a wide format": "{{ '%1000000000d' % 1 }} ||| x",
    "a power": "{{ 10 ** 10 ** 10 }} ||| x",
    "a long text": "{{ 'x' * 10**10 }} ||| x",
    "a doubled text": "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %} ||| x",
    "a doubled block": "{% set x = 'x' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60 + "{{ x }} ||| x",
    "a replaced text": "{% set x = 'x' * 90000 %}{{ x | replace('x', x) }} ||| x",
    "a joined text": "{% set x = 'x' * 90000 %}{{ x.join(x) }} ||| x",
    "a huge output": "{% for i in range(9999) %}{{ 'x' * 1000 }}{% endfor %} ||| x",
    "a division": "{{ 1 / 0 }} ||| x",
    "a missing field's field": "{{ missing.field }} ||| x",
    "no separator": "only a prompt",
    "broken syntax": "{{ text ||| x",
    "a file": "{% include '/etc/passwd' %} ||| x",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_or_broken_template_is_a_dead_letter_within_the_step_limit(name):
    renderer = TemplateRenderer([Template("t", HOSTILE[name], None)], seed=1)
    ((_, letter),) = renderer.render_rows("f:1", {"text": "some text"})
    assert isinstance(letter, DeadLetter) and letter.where == "f:1#t" and letter.reason.startswith("template 't': ")
    assert renderer._environment._steps <= promptsource.MAX_STEPS + 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("templates: {a: !!python/object/apply:os.system ['true']}", "is not a YAML file of templates at line 1"),
        ("templates: {a: !Other {jinja: x}}", "is not a YAML file of templates at line 1"),
        ("templates: {a: !Template {name: x}}", "template a has no text in `jinja`; fix or remove it"),
        ("dataset: x", "has no `templates`"),
        ("a: [", "is not a YAML file of templates"),
    ],
)
def test_an_invalid_template_file_raises_an_error_of_one_line(tmp_path, content, message):
    (tmp_path / "t.yaml").write_text(content)
    with pytest.raises(UsageError) as caught:
        promptsource.load_templates(str(tmp_path / "t.yaml"))
    assert message in str(caught.value) and "\n" not in str(caught.value)
