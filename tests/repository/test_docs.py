"""Commands, configs and links in the documentation match the code."""

import ast
import importlib
import itertools
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
import yaml

from cappy.cli import app
from cluster import config as configuration

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")), *sorted((ROOT / "docs").rglob("*.md"))]
PACKAGES = ("cappy", "cluster", "evaluation", "generation", "serving", "training")
SHIPPED = {path.stem for path in (ROOT / "cappy" / "configs").glob("*.yaml")}


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def code(page: Path, language: str) -> Iterator[str]:
    """Yield the fenced blocks of a language, also inside tabs; for `bash` also blocks that are indented by four spaces."""
    text = page.read_text(encoding="utf-8")
    for indent, block in re.findall(rf"^( *)```{language}\n(.*?)^\1```", text, re.DOTALL | re.MULTILINE):
        yield re.sub(f"^{indent}", "", block, flags=re.MULTILINE)
    if language == "bash":
        outside = re.sub(r"^( *)```\w*\n.*?^\1```", "", text, flags=re.DOTALL | re.MULTILINE)
        yield from (re.sub("^    ", "", block, flags=re.MULTILINE) for block in re.findall(r"(?:^    .*\n)+", outside, re.MULTILINE))


def commands(program: str, blocks: bool = True) -> list[tuple[str, list[str]]]:
    """Return (page, words) of each command of a program in inline code and, with `blocks`, in code blocks; shell variables are left out."""
    found = []
    for page in PAGES:
        texts = [re.sub(r"\\\n\s*", " ", block) for block in code(page, "bash") if blocks]
        inline = re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))
        lines = [part for text in texts for line in text.splitlines() for part in re.split(r"&&|\|", line)]
        for line in [*lines, *inline]:
            if line.strip().startswith(f"{program} ") and not re.search(r"\.\.\.|…|^\s*cappy-ray", line):
                words = shlex.split(re.sub(r'(--set )?"?\$\w+"?', "", line), comments=True)
                found.append((name(page), words))
    return found


@pytest.fixture(scope="module")
def command_line():
    return typer.main.get_command(app)


def test_documentation_has_commands_of_each_kind():
    assert len(commands("cappy")) > 50
    assert len(commands("make")) > 10
    assert len(commands("python")) > 15


def test_every_cappy_command_of_the_documentation_parses(command_line):
    placeholders = {"COMMAND", "VERB", "CONFIG", "URI", "SRC", "DST", "[DST]", "SCORER", "FILE"}
    named = commands("cappy", blocks=False)
    for page, words in commands("cappy"):
        arguments = words[1 : words.index(">")] if ">" in words else words[1:]
        command = command_line
        while getattr(command, "commands", None):
            if not arguments or arguments[0].startswith("-") or arguments[0] in placeholders:
                break
            assert arguments[0] in command.commands, f"{page}: {' '.join(words)}"
            command, arguments = command.commands[arguments[0]], arguments[1:]
        if command is command_line or "--help" in arguments or len(words) == 2 or placeholders & set(arguments):
            continue  # a name of a command in a sentence
        try:
            context = command.make_context("cappy", list(arguments))
        except Exception as error:
            if type(error).__name__ == "MissingParameter" and (page, words) in named:
                continue  # a sentence names the command with an option, e.g. `cappy push --pairs`
            pytest.fail(f"{page}: {' '.join(words)}: {error}")
        given = context.params.get("config")
        if given is not None and not given.endswith(".yaml"):
            assert given in SHIPPED, f"{page}: {' '.join(words)}: no shipped config {given}"


def test_every_setting_of_a_command_exists_and_accepts_its_value():
    checked = 0
    for page, words in commands("cappy"):
        overrides = [after for word, after in itertools.pairwise(words) if word == "--set" and "=" in after]
        if overrides:
            config = next((word for word in words if word in SHIPPED), None)
            try:
                configuration.load(config, overrides)
            except Exception as error:
                pytest.fail(f"{page}: {' '.join(words)}: {error}")
            checked += 1
    assert checked > 20


def test_every_config_of_the_documentation_loads(tmp_path):
    file = tmp_path / "config.yaml"
    checked = 0
    for page in PAGES:
        rows = re.findall(r"\| `((?:source|sampler): \{.*?)` \|", page.read_text(encoding="utf-8"))
        for text in [*code(page, "yaml"), *rows]:
            tree = yaml.safe_load(text)
            if not isinstance(tree, dict) or not tree.keys() <= configuration.Config.model_fields.keys():
                continue  # a file of another program
            for key in tree.get("serving", {}).get("api_keys", []):
                key["sha256"] = "0" * 64  # shortened in the page
            file.write_text(yaml.safe_dump(tree))
            try:
                configuration.load(str(file), [])
            except Exception as error:
                pytest.fail(f"{name(page)}: {text.strip()[:200]}: {error}")
            checked += 1
    assert checked > 20


def test_every_python_block_of_the_documentation_uses_names_that_exist():
    checked = 0
    for page in PAGES:
        for block in code(page, "python"):
            for node in ast.walk(ast.parse(block)):
                names: list[tuple[str, str]] = []
                if isinstance(node, ast.ImportFrom) and node.module:
                    names = [(node.module, alias.name) for alias in node.names]
                elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "cappy":
                    names = [("cappy", node.attr)]
                for module, attribute in names:
                    if module.split(".")[0] in PACKAGES:
                        assert hasattr(importlib.import_module(module), attribute), f"{name(page)}: {module}.{attribute}"
                        checked += 1
    assert checked > 5


def test_every_make_target_of_the_documentation_exists():
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = {(page, word) for page, words in commands("make") for word in words[1:] if "=" not in word}
    assert [each for each in sorted(used) if each[1] not in targets] == []


def with_imports(file: Path) -> str:
    """Return the text of a benchmark and of the modules of `benchmarks/` that it imports: some take their options from there."""
    text = file.read_text(encoding="utf-8")
    imported = re.findall(r"^from benchmarks import (.+)$", text, re.MULTILINE)
    names = {each.strip() for line in imported for each in line.split(",")}
    names |= set(re.findall(r"^from benchmarks\.(\w+) import", text, re.MULTILINE))
    return text + "".join((file.parent / f"{each}.py").read_text(encoding="utf-8") for each in sorted(names))


def test_every_benchmark_of_the_documentation_has_the_options_it_is_given():
    checked = 0
    for page, words in commands("python"):
        if words[1] != "-m" or not words[2].startswith("benchmarks."):
            continue
        file = ROOT / f"{words[2].replace('.', '/')}.py"
        assert file.is_file(), f"{page}: {' '.join(words)}"
        text = with_imports(file)
        for option in (word for word in words[3:] if word.startswith("--")):
            assert f'"{option}"' in text, f"{page}: {' '.join(words)}: no option {option}"
        checked += 1
    assert checked > 15


def test_links_of_the_pages_outside_the_site_lead_to_files():
    for page in PAGES[:4]:
        for link in re.findall(r"\]\(([^)#\s]+)[^)\s]*\)", page.read_text(encoding="utf-8")):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{name(page)}: {link}"


def test_documentation_files_that_the_code_names_exist():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    generated = {"reference/settings.md", "reference/cli.md", "reference/python.md", "reference/tests.md"}
    for file in listed:
        if file.endswith((".py", ".yaml", ".yml", ".toml", "Makefile")) and not file.startswith(("tests/fixtures/b5d7af8", "tests/tools/")):
            if not (ROOT / file).is_file():
                continue
            for found in re.findall(r"\bdocs/([\w/-]+\.(?:md|json|png|svg))\b", (ROOT / file).read_text(encoding="utf-8")):
                assert found in generated or (ROOT / "docs" / found).is_file(), f"{file}: docs/{found}"
