import os
import resource
from contextlib import closing
from pathlib import Path

import pytest

from cluster.errors import UsageError
from generation.sources import promptsource
from generation.sources.promptsource import TemplateRenderer
from generation.sources.row import DeadLetter
from generation.sources.template_sandbox import Limits, Template

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
    renderer = TemplateRenderer(loaded, seed=1)
    ((location, row),) = renderer.render_rows([("f:1", RAW)])
    assert location == "f:1#choose" and row == {
        "instruction": "I fell|||down. It hurt. or I flew.?",
        "references": ["It hurt."],
        "answer_choices": ["It hurt.", "I flew."],
        "template": "choose",
        "example": "I fell|||down.",
    }
    assert renderer.blank == 1
    both = [row for _, row in renderer.render_rows([("f:2", {**RAW, "question": "effect"})])]
    assert [(row["template"], row["answer_choices"]) for row in both] == [("choose", ["It hurt.", "I flew."]), ("effect only", None)]
    renderer.close()


@pytest.fixture(scope="module")
def processes():
    """Return the renderer of a template; each is closed after the tests of this module."""
    found = {}

    def renderer(template, choices=None):
        key = (template, choices)
        found[key] = found.get(key) or TemplateRenderer([Template("t", *key)], seed=1, limits=Limits(cpu_s=0.3))
        return found[key]

    yield renderer
    for each in found.values():
        each.close()


@pytest.fixture
def render(processes):
    """Return a function that renders one template for one raw row: the row or the dead letter."""

    def one(template, raw=None, choices=None):
        rows = [row for _, row in processes(template, choices).render_rows([("f:1", {"text": "some text"} if raw is None else raw)])]
        assert len(rows) == 1
        return rows[0]

    return one


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
        ("{% if missing is defined %}{{ missing }}{% endif %}{{ missing | default('no') }} ||| x", "no"),
        ("{% if none_here is none and not none_here %}q{% endif %}{{ none_here | default('no', true) }} ||| x", "qno"),
        ("{{ text.split()[-1] }}{{ text[0] }} ||| x", "texts"),
    ],
)
def test_functions_and_filters_of_promptsource_templates_are_supported(render, text, instruction):
    assert render(text, {"text": "some text", "none_here": None})["instruction"] == instruction


def test_several_answers_are_several_references_and_the_choice_filter_is_seeded_by_the_row(render):
    assert render("q ||| a ||| b ||| a")["references"] == ["a", "b", "a"]
    drawn = [render("{{ range(1000) | list | choice }} ||| x", {"text": text})["instruction"] for text in "aab"]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("template", "raw", "reason"),
    [
        ("{{ text }} Is it good? ||| {{ answer_choices[label] }}", {"sentence": "good film", "label": 1}, "'text' is undefined"),
        ("Q {{ text }} ||| {{ answer }}", {"text": "x", "answer": None}, "`answer` is null"),
        ("Q {{ text }} ||| {{ answer }}", {"text": "x", "answer": float("nan")}, "`answer` is null"),
        ("Q {{ text ~ answer }} ||| a", {"text": "x", "answer": None}, "`answer` is null"),
        ("Q {{ [text, answer] }} ||| a", {"text": "x", "answer": None}, "`answer` is null"),
        ("Q {{ [text, answer] }} ||| a", {"text": "x"}, "'answer' is undefined"),
        ("Q {{ answers.text }} ||| {{ answers.text[0] }}", {"answers": {"text": [None]}}, "`answers.text` is null"),
        ("Q {{ text }} ||| {% if label == 0 %}No{% else %}Yes{% endif %}", {"text": "x", "label": None}, "`label` is null"),
        ("Q {{ text }} ||| {% if label == 0 %}No{% else %}Yes{% endif %}", {"text": "x"}, "'label' is undefined"),
        ("Q {{ text }} ||| {% if label %}Yes{% else %}No{% endif %}", {"text": "x"}, "'label' is undefined"),
        ("Q {% for each in texts %}{{ each }}{% endfor %} ||| a", {"text": "x", "texts": None}, "`texts` is null"),
        ("Q {{ text }} ||| {{ answer_choices[label] }}", {"text": "x", "label": -1}, "the index -1 is negative"),
        ("Q {{ text }} ||| {{ answer_choices[label] }}", {"text": "x", "label": 2}, "has no element 2"),
        ("Q {{ text }} ||| {{ ['No', 'Yes'][label] }}", {"text": "x", "label": -1}, "the index -1 is negative"),
        ("Q {{ text }} ||| {{ ['No', 'Yes'][label - 1] }}", {"text": "x", "label": 0}, "the index -1 is negative"),
        ("Q {{ text }} ||| {{ {0: 'No', 1: 'Yes'}[label] }}", {"text": "x", "label": 3}, "has no"),
        ("Q {{ text }} ||| {{ answer }}", {"text": "x", "answer": " "}, "the answer is blank"),
        ("Q {{ text | map('upper') }} ||| a", {"text": "x"}, "a generator cannot be printed"),
        ("Q {{ text.upper }} ||| a", {"text": "x"}, "builtin_function_or_method cannot be printed"),
        ("Q {{ text }} ||| a", {"text": b"x"}, "a bytes cannot be printed"),
        ("Q {{ [1, 2] | random }} ||| a", {"text": "x"}, "the `random` filter has no seed; use `choice`"),
    ],
)
def test_a_value_that_is_missing_or_has_no_text_is_a_dead_letter(render, template, raw, reason):
    letter = render(template, raw, "No ||| Yes")
    assert isinstance(letter, DeadLetter) and reason in letter.reason and letter.reason.startswith("template 't': ")


def test_pipes_in_a_list_of_the_row_do_not_split_the_answer(render):
    assert render("q ||| {{ texts[0] }}", {"texts": ["a ||| b"]})["references"] == ["a ||| b"]


# The limits of the process end each of these; a template cannot reach the memory or the time of the reader.
HOSTILE = {
    "a wide indentation": "{{ [[text]] | tojson(indent=300000000) }} ||| x",
    "a wide filter": "{{ text | center(10**9) }} ||| x",
    "a long sum": "{{ range(100000) | map('string') | sum(start=[text] * 10**9) }} ||| x",
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
def test_a_hostile_or_broken_template_is_a_dead_letter_and_takes_no_memory_here(render, name):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    letter = render(HOSTILE[name])
    assert isinstance(letter, DeadLetter) and letter.where == "f:1#t" and letter.reason.startswith("template 't': ")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


ENDLESS_C_CODE = """{% set ns = namespace(a=1, b=1) %}{% for i in range(40) %}{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}
{% endfor %}{{ ns.a == ns.b if poison else text }} ||| x"""


@pytest.mark.slow
def test_a_template_that_ends_its_process_costs_only_its_own_row():
    """A comparison in C code does not stop for the signal of the time limit, so the limit ends the process."""
    templates = [Template("bad", ENDLESS_C_CODE, None), Template("good", "{{ text }} ||| x", None)]
    rows = [(f"f:{n}", {"text": f"row {n}", "poison": n == 3}) for n in range(6)]
    with closing(TemplateRenderer(templates, 1, Limits(cpu_s=0.3))) as renderer:
        rendered = list(renderer.render_rows(rows))
    letters = [row for _, row in rendered if isinstance(row, DeadLetter)]
    assert [(each.where, each.reason) for each in letters] == [
        ("f:3#bad", "template 'bad': it used too much memory or CPU time, so its process was ended")
    ]
    assert [where for where, _ in rendered] == [f"f:{n}#{name}" for n in range(6) for name in ("bad", "good")]


def test_a_killed_process_is_started_again_without_a_lost_row():
    rows = [(f"f:{n}", {"text": f"row {n}"}) for n in range(3)]
    with closing(TemplateRenderer([Template("t", "{{ text }} ||| x", None)], 1)) as renderer:
        assert len(list(renderer.render_rows(rows))) == 3
        os.kill(renderer._process.pid, 9)
        again = [row for _, row in renderer.render_rows(rows)]
    assert not any(isinstance(row, DeadLetter) for row in again)
    assert [row["instruction"] for row in again] == ["row 0", "row 1", "row 2"]


@pytest.mark.parametrize("name", ["a wide indentation", "a wide filter", "a long text"])
def test_a_template_gets_no_more_memory_than_its_limit(name):
    with closing(TemplateRenderer([Template("t", HOSTILE[name], None)], 1, Limits(cpu_s=30, memory=64 << 20))) as renderer:
        ((_, letter),) = renderer.render_rows([("f:1", {"text": "some text"})])
        status = Path(f"/proc/{renderer._process.pid}/status").read_text()
    assert letter.reason.startswith("template 't': MemoryError")
    assert int(status.split("VmHWM:")[1].split()[0]) < 200_000  # in kB, with the interpreter


def test_the_process_gets_no_variable_that_can_hold_a_credential(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with closing(TemplateRenderer([Template("t", "{{ text }} ||| x", None)], 1)) as renderer:
        list(renderer.render_rows([("f:1", {"text": "a"})]))
        assert b"secret" not in Path(f"/proc/{renderer._process.pid}/environ").read_bytes()


def test_a_template_over_the_time_limit_is_stopped_after_three_rows_and_others_are_rendered():
    slow = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %} ||| x"
    with closing(
        TemplateRenderer([Template("slow", slow, None), Template("good", "{{ text }} ||| x", None)], 1, Limits(cpu_s=0.1))
    ) as renderer:
        rendered = list(renderer.render_rows((f"f:{n}", {"text": f"row {n}"}) for n in range(300)))
    reasons = [row.reason for where, row in rendered if where.endswith("#slow")]
    assert reasons[:3] == ["template 'slow': more than 0.1 s of CPU time"] * 3
    assert set(reasons[3:]) == {"template 'slow': stopped, after 3 rows in a row took more than 0.1 s of CPU time"} and len(reasons) == 300
    assert sum(not isinstance(row, DeadLetter) for _, row in rendered) == 300


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
