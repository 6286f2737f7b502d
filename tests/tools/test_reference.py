import re

import pytest

from cluster.config import Config, Section
from tests.conftest import cappy
from tools import reference


def test_every_setting_has_a_docstring():
    assert reference.missing_docs() == []


def test_a_setting_without_a_docstring_is_found(monkeypatch):
    class Documented(Section):
        """A section."""

        size: int = 1
        """In tokens."""

    class Undocumented(Documented):
        rate: float = 1.0

    monkeypatch.setattr(reference, "groups", lambda: [reference.Group("x", Undocumented, "")])
    assert reference.missing_docs() == ["Undocumented.rate"]


def test_the_settings_page_lists_every_value_of_a_config_with_its_default():
    rows = dict(re.findall(r'^\| <span id="([^"]+)">.*?\| ([^|]*\|[^|]*) \|', reference.settings_page(), re.M))
    assert {"workspace", "training.batch_size", "serving.llm_replicas.min", "sampler.decodings.top_k"} <= set(rows)
    for section, fields in Config().model_dump(mode="json").items():
        for name in fields if isinstance(fields, dict) else ():
            assert any(anchor.startswith(section) and anchor.endswith(f".{name}") for anchor in rows), f"{section}.{name}"


@pytest.mark.parametrize(
    ("setting", "cells"),
    [
        ("training.batch_size", ["integer", "`32`", "≥ 1", "Pairs per optimizer step, summed over all workers."]),
        ("training.min_workers", ["integer or null", "`null`", "≥ 1"]),
        ("training.parallel", ["`ddp`, `fsdp`", '`"ddp"`', ""]),
        ("seed", ["integer", "`20261121`", "≥ 0, < 2147483648"]),
        ("sampler-engine-kind-endpoint.base_url", ["text", "required"]),
        ("plan.gpus", ["list of integer", "`[1, 8, 64, 512]`"]),
        ("training.objective", ["[training.objective](#training-objective)", ""]),
        ("sampler.decodings", ["list of [sampler.decodings[]](#sampler-decodings)", "see Meaning"]),
    ],
)
def test_a_row_has_type_default_and_range(setting, cells):
    (row,) = [line for line in reference.settings_page().splitlines() if f'<span id="{setting}">' in line]
    assert row.removeprefix("| ").removesuffix(" |").split(" | ")[1 : 1 + len(cells)] == cells


def test_every_link_of_the_settings_page_has_its_section():
    page = reference.settings_page()
    anchors = re.findall(r"\{ #([^ ]+) \}", page)
    assert len(anchors) == len(set(anchors))
    assert set(re.findall(r"\]\(#([^)]+)\)", page)) <= set(anchors)


def test_the_command_line_page_has_every_command_and_option_of_the_help():
    page = reference.cli_page()
    top = re.sub(r"\x1b\[[0-9;]*m", "", cappy("--help", COLUMNS="120").stdout)
    commands = re.findall(r"^│ (\w+) ", top, re.M)
    assert len(commands) > 10
    for command in commands:
        assert re.search(rf"^## cappy {command}$", page, re.M)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", cappy("serve", "--help", COLUMNS="120").stdout)
    section = page.partition("## cappy serve\n")[2].partition("\n## ")[0]
    options = set(re.findall(r"^│ +(?:\* +)?(--[\w-]+)", shown, re.M)) - {"--help"}
    assert options and all(f"`{option}" in section for option in options)
    assert "### cappy config show" in page and "Run as a Ray job" in section and "\\[default: 2" in page


def test_the_python_page_names_every_public_name_once():
    page = reference.python_page()
    names = reference.public_names()
    assert names
    for name, target in names:
        assert page.count(f"## {name}\n\n::: {target}\n") == 1
