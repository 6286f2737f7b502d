"""Check the English of this repository: banned words and sentences that are too long.

    python -m tools.prose                      # the whole tree
    python -m tools.prose --only serving docs  # a part of it

Reads Markdown, docstrings, comments, the strings people read, comments of YAML, TOML and the Makefile, the text of HTML pages and
test names. Inline code, code blocks, URLs and paths are skipped. `tools/prose_rules.py` holds the banned words.

Prints `path:line: word -> suggestion` for each finding and a summary. Exit code 1 when there are findings.

A finding that must stay is excepted in one of two ways, both with a reason:
- a marker on the same line or the line above: `# prose: allow WORD: REASON` (in Markdown and HTML inside `<!-- -->`);
- a line `PATH | EXCERPT | REASON` in `tools/prose_exceptions.txt`; EXCERPT is a part of the sentence, in one line.
An exception that excuses nothing is a finding too.
"""

import argparse
import ast
import bisect
import io
import json
import re
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from tools.prose_rules import BANNED, SENTENCE_START, Rule

MAX_WORDS = 30
"""Words of a sentence at most; inline code, a URL and a placeholder count as one word each."""

ROOT = Path(__file__).resolve().parent.parent
EXCEPTIONS = "tools/prose_exceptions.txt"

# b5d7af8: fixtures that version made.
_SKIPPED_FOLDERS = {".git", ".venv", "site", "runs", "node_modules", "__pycache__", "build", "dist", "b5d7af8"}
_SKIPPED_FILES = {"tools/prose_rules.py", "tests/tools/test_prose.py"}  # they hold the banned words
_MESSAGE_CALLS = re.compile(
    r"(Error|Exception|Warning|Stopped|Refused)$|^(_?fail|say|log|warn|warning|info|error|debug|exception|print|echo|secho|confirm|note|status|rule|"
    r"add_argument|ArgumentParser|Option|Argument|skip|xfail|Finding)$"
)
_TEXT_KEYWORDS = {"help", "epilog", "short_help", "description", "summary", "reason", "title", "setting", "remedy"}
_GOOGLE_SECTION = re.compile(r"^(Args|Arguments|Attributes|Returns|Raises|Yields|Examples?|Notes?|Columns|Shapes|References?|Source):\s*$")
_MARKER = re.compile(r"prose: allow (?P<word>[^:]+):(?P<reason>.*?)(-->|$)")
_ABBREVIATION = re.compile(r"(\b(e\.g|i\.e|etc|vs|cf|resp|approx|al|fig|sec|no|incl|max|min)|\b[A-Z])\.$", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?][)\"'”*_]*(?=\s+[^a-z\s]|\s*$)")
_WORD = re.compile(r"[^\s/|…–—-]*[A-Za-z0-9_][^\s|…–—]*")

_BLANKED = re.compile(
    r"(?P<code>``[^`]+``|`[^`\n]+(?:\n[^`\n]+)?`)|(?P<url><?\b(?:https?|s3|git\+https|file)://[^\s)>\]]+>?)"
    r"|(?P<link>(?<=\])\([^)\s]*(?:\s+\"[^\"]*\")?\))|(?P<tag></?[a-zA-Z!][^<>\n]*>)|(?P<path>[\w.{}-]*/[\w./{}*-]+\.\w{1,8}\b)"
)


@dataclass(frozen=True)
class Passage:
    """A piece of prose: one paragraph, list item, table cell, comment or string."""

    line: int
    """Line of the first character, from 1."""
    text: str
    """With its line breaks, so that line `line + text[:i].count("\\n")` holds character i."""
    kind: str
    """`doc`, `docstring`, `comment`, `string`, `html` or `name`."""
    end_line: int = 0
    """For a string: the last line of the source it is written in, where line breaks of text and source differ. Else 0."""


@dataclass(frozen=True)
class Finding:
    """A word or sentence that must change."""

    path: str
    line: int
    word: str
    """The banned words as they are written, or `N words`."""
    suggestion: str
    sentence: str
    """The text around the word, in one line."""
    kind: str

    def __str__(self) -> str:
        """`path:line: word -> suggestion`."""
        return f"{self.path}:{self.line}: {self.word} -> {self.suggestion}"


# --- rules ---------------------------------------------------------------------------------------------------------------------


def _compile(rules: tuple[Rule, ...]) -> re.Pattern[str]:
    """Return one pattern for all rules; group `r{i}` is rule i."""
    parts = (f"(?P<r{i}>" + re.sub(r"\((?!\?)", "(?:", rule.pattern).replace(" ", r"\s+") + ")" for i, rule in enumerate(rules))
    return re.compile(r"(?<![\w'’.@-])(?:" + "|".join(parts) + r")(?![\w’@-]|'[a-z]|\.\w|\()", re.IGNORECASE)


_BANNED = _compile(BANNED)
_START = _compile(SENTENCE_START)
_UNLESS = {rule: re.compile(rule.unless.replace(" ", r"\s+"), re.IGNORECASE) for rule in BANNED if rule.unless}


def blank(text: str) -> str:
    """Replace inline code, URLs, link targets, tags and paths by `_` and spaces, one word each and of the same length."""

    def word(match: re.Match[str]) -> str:
        filler = " " if match.lastgroup in ("link", "tag") else "_"
        return "".join("\n" if letter == "\n" else filler for letter in match[0])

    return _BLANKED.sub(word, text)


def sentences(text: str, also_at: str = "") -> Iterator[tuple[int, str]]:
    """Yield (offset, sentence) of a passage; the characters in `also_at` end a sentence too."""
    start = 0
    ends = [match.end() for match in _SENTENCE_END.finditer(text) if not _ABBREVIATION.search(text[: match.end()])]
    ends += [i + 1 for i, letter in enumerate(text) if letter in also_at]
    for end in [*sorted(set(ends)), len(text)]:
        piece = text[start:end]
        if stripped := piece.strip():
            yield start + len(piece) - len(piece.lstrip()), stripped
        start = end


def check(passage: Passage) -> Iterator[tuple[int, str, str, str]]:
    """Yield (offset, word, suggestion, sentence) of each fault of a passage."""
    text = blank(passage.text)
    short = passage.kind in ("string", "name")
    for offset, sentence in sentences(text, also_at=";\n" if passage.kind == "string" else ""):
        original = " ".join(passage.text[offset : offset + len(sentence)].split())
        question = sentence.rstrip("*_\"')").endswith("?")
        bare = sentence.lstrip("*_\"'(# ")
        read_to = 0
        if not question and not short and (match := _START.match(bare)):
            rule = SENTENCE_START[int(str(match.lastgroup)[1:])]
            read_to = len(sentence) - len(bare) + match.end()
            yield offset + len(sentence) - len(bare), " ".join(match[0].split()), rule.replacement, original
        for match in _BANNED.finditer(sentence):
            if match.start() < read_to:
                continue
            rule = BANNED[int(str(match.lastgroup)[1:])]
            following = re.match(r"\s+\w+", sentence[match.end() :])
            around = (sentence[: match.end()], sentence[: match.end()] + (following[0] if following else ""))
            if question and rule.in_question:
                continue
            if rule.unless and any(_UNLESS[rule].search(piece) for piece in around):
                continue
            yield (
                offset + match.start(),
                " ".join(passage.text[offset + match.start() : offset + match.end()].split()),
                rule.replacement,
                original,
            )
        words = len(_WORD.findall(sentence))
        if words > MAX_WORDS and passage.kind != "name":
            yield offset, f"{words} words", f"split the sentence; at most {MAX_WORDS} words", original


# --- readers: a file to its passages ---------------------------------------------------------------------------------------------


def markdown(text: str, first_line: int = 1) -> Iterator[Passage]:
    """Yield the paragraphs, headings, list items and table cells of a Markdown text."""
    fence = ""
    block: list[str] = []
    start = 0
    in_list = in_admonition = False
    lines = text.split("\n")
    front_matter = lines[0].strip() == "---" and first_line == 1

    def flush() -> Iterator[Passage]:
        if block:
            yield Passage(start, "\n".join(block), "doc")
            block.clear()

    for number, line in enumerate(lines, first_line):
        stripped = line.strip()
        if front_matter:
            front_matter = number == first_line or stripped != "---"
            continue
        if fence:
            if stripped.startswith(fence):
                fence = ""
            continue
        if match := re.match(r"(```+|~~~+)", stripped):
            yield from flush()
            fence = match[1]
            continue
        if not stripped:
            yield from flush()
            continue
        indent = len(line) - len(line.lstrip())
        if indent == 0:
            in_admonition = bool(re.match(r"(!!!|\?\?\?\+?|===) ", line))
        if not block and indent >= 4 and not in_list and not in_admonition:
            continue  # a code block
        if stripped.startswith(("<!--", ":::", "![", "[//]:")) or re.fullmatch(r"[-=*_|: ]+|<[^>]+>", stripped):
            yield from flush()
            continue
        if stripped.startswith("|"):
            yield from flush()
            for cell in re.split(r"(?<!\\)\|", stripped.strip("|")):
                if cell.strip():
                    yield Passage(number, cell.strip(), "doc")
            continue
        if stripped.startswith("#") or (in_admonition and indent == 0):
            yield from flush()
            in_list = False
            heading = re.sub(r'^(#+|!!!|\?\?\?\+?|===)\s*(\w+(?=\s+"))?', "", stripped)
            yield Passage(number, heading, "doc")
            continue
        if item := re.match(r"([-*+]|\d+[.)])\s+", stripped):
            yield from flush()
            in_list = True
            block, start = [stripped[item.end() :]], number
            continue
        if not block:
            start = number
            in_list = in_list and indent > 0
        block.append(stripped.lstrip("> "))
    yield from flush()


def docstring(text: str, line: int) -> Iterator[Passage]:
    """Yield the paragraphs of a docstring; indentation separates sections, list items and code."""
    lines = text.split("\n")
    indents = [len(each) - len(each.lstrip()) for each in lines[1:] if each.strip()]
    margin = min(indents, default=0)
    block: list[str] = []
    start = line
    section = False
    entry = 0  # indentation of the entries of a section
    code = False

    def flush() -> Iterator[Passage]:
        if block:
            yield Passage(start, "\n".join(block), "docstring")
            block.clear()

    for number, raw in enumerate(lines, line):
        stripped = raw.strip()
        indent = 0 if number == line else len(raw) - len(raw.lstrip()) - margin
        if not stripped:
            yield from flush()
            code = False
            continue
        if _GOOGLE_SECTION.match(stripped):
            yield from flush()
            section, entry = True, 0
            continue
        section = section and indent > 0
        if (not block and not section and indent >= 4) or stripped.startswith((">>>", "...  ")):
            code = True
        if code:
            continue
        if section and not entry:
            entry = indent
        new_entry = section and indent == entry and re.match(r"[\w*`.]+(\s*\([^)]*\))?:(\s|$)", stripped)
        item = re.match(r"([-*]|\d+[.)])\s+", stripped)
        if new_entry or item or stripped.startswith("|"):
            yield from flush()
            stripped = stripped[item.end() :] if item else stripped
        if not block:
            start = number
        block.append(stripped)
    yield from flush()


def hash_comments(text: str) -> Iterator[Passage]:
    """Yield the `#` comments of YAML, TOML or a Makefile, adjacent lines as one; and the help text of make targets (`##`)."""
    comments = []
    for number, line in enumerate(text.split("\n"), 1):
        if match := re.search(r"(?:^|\s)#+\s?(?P<comment>(?!!)[^\"'}]*)$", line):
            comments.append((number, match.start("comment") if line.lstrip().startswith("#") else -1, match["comment"]))
    yield from _joined(comments)


def _joined(comments: list[tuple[int, int, str]]) -> Iterator[Passage]:
    """Join whole-line comments on adjacent lines and of one column; -1 is a comment behind code."""
    block: list[str] = []
    start = last = column = 0
    for number, where, text in comments:
        text = text.strip()
        skip = not text or text.startswith(
            ("type:", "noqa", "prose:", "fmt:", "pragma", "yaml-language-server", "ruff:", "mypy:", "---", "===")
        )
        if block and (skip or where < 0 or number != last + 1 or where != column or re.match(r"[-*] ", text)):
            yield Passage(start, "\n".join(block), "comment")
            block = []
        if skip:
            continue
        if where < 0:
            yield Passage(number, text, "comment")
            continue
        if not block:
            start, column = number, where
        block.append(text.lstrip("-* "))
        last = number
    if block:
        yield Passage(start, "\n".join(block), "comment")


def _string(node: ast.Constant | ast.JoinedStr) -> str:
    """Return the text of a string, `X` for each value of an f-string; empty for other constants."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)
    return node.value if isinstance(node.value, str) else ""


def _is_prose(value: str) -> bool:
    """Return whether a string has four words or more and is not a regular expression."""
    words = len(re.findall(r"[A-Za-z]{2,}", value))
    return words >= 4 and bool(re.search(r"[a-z] [a-z]", value)) and not re.search(r"\(\?[:P<!=]|\\[bsdw]", value)


def python(text: str, product: bool) -> Iterator[Passage]:
    """Yield the prose of a Python file: docstrings, comments and messages; of the product every string of four words or more."""
    docstrings: set[int] = set()
    messages: set[int] = set()
    inside_fstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):  # a node comes before the nodes it holds
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings.add(id(node.value))
            yield from docstring(node.value.value, node.value.lineno)
        elif isinstance(node, ast.Call):
            function = node.func
            name = function.attr if isinstance(function, ast.Attribute) else function.id if isinstance(function, ast.Name) else ""
            arguments: list[ast.expr] = [key.value for key in node.keywords if key.arg in _TEXT_KEYWORDS]
            if _MESSAGE_CALLS.search(name):
                arguments += [*node.args, *(key.value for key in node.keywords)]
            for argument in arguments:
                messages.update(id(part) for part in ast.walk(argument))
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if node.name.startswith("test_"):
                yield Passage(node.lineno, node.name.replace("_", " "), "name")
        elif isinstance(node, (ast.Constant, ast.JoinedStr)) and id(node) not in docstrings and id(node) not in inside_fstrings:
            if isinstance(node, ast.JoinedStr):
                inside_fstrings.update(id(part) for value in node.values for part in ast.walk(value))
            if (product or id(node) in messages) and _is_prose(value := _string(node)):
                value = re.sub(r"\[/?[a-z ]+\]", "", value)  # the markup of rich
                if "\n#" in value or "\n- " in value or "\n|" in value:
                    yield from (Passage(node.lineno, part.text, "string", node.end_lineno or 0) for part in markdown(value, 2))
                else:
                    yield Passage(node.lineno, value, "string", node.end_lineno or node.lineno)
    comments = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith("#!"):
            alone = token.line[: token.start[1]].strip() == ""
            comments.append((token.start[0], token.start[1] if alone else -1, token.string.lstrip("#")))
    yield from _joined(comments)


class _Page(HTMLParser):
    """Collect the text, the texts of attributes and the strings and comments of scripts of an HTML page."""

    def __init__(self) -> None:
        super().__init__()
        self.passages: list[Passage] = []
        self.inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "style", "code", "pre"):
            self.inside = tag
        for name, value in attrs:
            if name in ("title", "placeholder", "alt", "aria-label", "content") and value and " " in value:
                self.passages.append(Passage(self.getpos()[0], value, "html"))

    def handle_endtag(self, tag: str) -> None:
        if tag == self.inside:
            self.inside = ""

    def handle_data(self, data: str) -> None:
        line = self.getpos()[0]
        if self.inside == "script":
            for match in re.finditer(r"\"([^\"\n]+)\"|'([^'\n]+)'|`([^`]+)`|(?<![:\"'])//\s*([^\n]+)|/\*(.*?)\*/", data, re.DOTALL):
                text = next(group for group in match.groups() if group is not None)
                if _is_prose(text):
                    self.passages.append(Passage(line + data[: match.start()].count("\n"), re.sub(r"\$\{[^}]*\}", "X", text), "html"))
        elif not self.inside and data.strip():
            lead = len(data) - len(data.lstrip())
            self.passages.append(Passage(line + data[:lead].count("\n"), data.strip(), "html"))


def html(text: str) -> Iterator[Passage]:
    """Yield the prose of an HTML page."""
    page = _Page()
    page.feed(text)
    yield from page.passages


def notebook(text: str) -> Iterator[Passage]:
    """Yield the prose of the Markdown cells of a notebook, all at line 1."""
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            yield from (Passage(1, part.text, "doc", 1) for part in markdown(source))


def passages(path: str, text: str) -> Iterator[Passage]:
    """Yield the prose of a file, by the kind its name has."""
    name = path.rsplit("/", 1)[-1]
    if name.endswith(".md"):
        yield from markdown(text)
    elif name.endswith(".py"):
        yield from python(text, product=not path.startswith(("tests/", "benchmarks/")))
    elif name.endswith((".yaml", ".yml", ".toml")) or name == "Makefile":
        yield from hash_comments(text)
    elif name.endswith(".html"):
        yield from html(text)
    elif name.endswith(".ipynb"):
        yield from notebook(text)


# --- files and exceptions --------------------------------------------------------------------------------------------------------


def files(root: Path, only: list[str]) -> list[str]:
    """Return the paths to read, relative to `root`: the files git does not ignore, or without git all, below one of `only`."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=root, capture_output=True, text=True, check=False
    )
    if listed.returncode == 0:
        found = listed.stdout.splitlines()
    else:
        found = [each.relative_to(root).as_posix() for each in root.rglob("*") if each.is_file()]
    wanted = [each.rstrip("/") for each in only]
    return sorted(
        path
        for path in set(found)
        if path.endswith((".md", ".py", ".yaml", ".yml", ".toml", ".html", ".ipynb", "Makefile"))
        and path not in _SKIPPED_FILES
        and not _SKIPPED_FOLDERS.intersection(path.split("/"))
        and (root / path).is_file()
        and (not wanted or any(path == each or path.startswith(each + "/") for each in wanted))
    )


def check_text(path: str, text: str) -> tuple[list[Finding], list[Finding]]:
    """Return the findings of a file, and those its own markers except; a marker that excepts nothing is a finding."""
    lines = text.split("\n")
    markers = {
        number: (match["word"].strip().lower(), match["reason"].strip(), [0])
        for number, line in enumerate(lines, 1)
        if (match := _MARKER.search(line)) and not path.startswith("tools/prose")
    }
    findings, excepted = [], []
    for passage in passages(path, text):
        starts = [match.start() for match in re.finditer("\n", passage.text)]
        for offset, word, suggestion, sentence in check(passage):
            line = passage.line + (0 if passage.end_line else bisect.bisect_left(starts, offset))
            if passage.end_line:  # a string of several source lines: the line that holds the word
                needle = re.search(r"[A-Za-z]{3,}", word if not word[0].isdigit() else sentence)
                span = range(passage.line, passage.end_line + 1)
                line = next((n for n in span if needle and needle[0].lower() in lines[n - 1].lower()), passage.line)
            finding = Finding(path, line, word, suggestion, sentence, passage.kind)
            marker = next((markers[n] for n in (line, line - 1) if n in markers and markers[n][0] == word.lower()), None)
            if marker and marker[1]:
                marker[2][0] += 1
                excepted.append(finding)
            else:
                findings.append(finding)
    for number, (word, reason, used) in markers.items():
        if not reason:
            findings.append(Finding(path, number, f"prose: allow {word}", "give a reason after the colon", "", "exception"))
        elif not used[0]:
            findings.append(Finding(path, number, f"prose: allow {word}", "remove this exception, it excepts nothing", "", "exception"))
    return sorted(findings, key=lambda each: each.line), excepted


def read_exceptions(text: str) -> list[tuple[int, str, str, str]]:
    """Return (line, path, excerpt, reason) of each line of an exceptions file. Raises `ValueError` for a line without all three."""
    entries = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        fields = [part.strip() for part in line.split(" | ")]
        if len(fields) != 3 or not all(fields):
            raise ValueError(f"{EXCEPTIONS}:{number}: write PATH | EXCERPT | REASON")
        entries.append((number, fields[0], " ".join(fields[1].split()), fields[2]))
    return entries


def run(root: Path, only: list[str]) -> tuple[list[Finding], int, int]:
    """Return the findings below `root`, the number of files read and the number of findings excepted."""
    listed = root / EXCEPTIONS
    entries = read_exceptions(listed.read_text()) if listed.exists() else []
    used = dict.fromkeys((number for number, *_ in entries), 0)
    findings: list[Finding] = []
    excepted = 0
    paths = files(root, only)
    for path in paths:
        found, marked = check_text(path, (root / path).read_text(encoding="utf-8"))
        excepted += len(marked)
        for finding in found:
            entry = next((number for number, where, excerpt, _ in entries if where == path and excerpt in finding.sentence), 0)
            if entry and finding.sentence:
                used[entry] += 1
                excepted += 1
            else:
                findings.append(finding)
    for number, where, excerpt, _ in entries:
        if not used[number] and (not only or where in paths):
            findings.append(Finding(EXCEPTIONS, number, excerpt, "remove this exception, it excepts nothing", "", "exception"))
    return findings, len(paths), excepted


def main(arguments: list[str] | None = None) -> int:
    """Check the tree or a part of it; print the findings and a summary; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.prose", description="Check the English of this repository.")
    parser.add_argument("paths", nargs="*", metavar="PATH", help="same as --only; pre-commit passes the changed files here")
    parser.add_argument("--only", nargs="+", default=[], metavar="PATH", help="check these files and folders instead of the whole tree")
    parser.add_argument("--counts", action="store_true", help="also print the number of findings by file and by suggestion")
    parser.add_argument("--verbose", action="store_true", help="print the sentence below each finding")
    options = parser.parse_args(arguments)
    only = [Path(each).resolve().relative_to(ROOT.resolve()).as_posix() for each in options.only + options.paths]
    try:
        findings, read, excepted = run(ROOT, [] if "." in only else only)
    except ValueError as error:
        print(error)
        return 2
    for finding in findings:
        print(finding)
        if options.verbose and finding.sentence:
            print(f"    {finding.sentence}")
    if options.counts:
        for field in ("path", "suggestion", "kind"):
            print(f"by {field}:")
            for name, count in Counter(getattr(finding, field) for finding in findings).most_common():
                print(f"  {count:5} {name}")
    print(f"{read} files read, {len(findings)} findings, {excepted} exceptions")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
