"""The list of benchmarks that `make bench` runs."""

import ast
from pathlib import Path

import pytest

import benchmarks
from benchmarks.__main__ import BENCHMARKS, main

FOLDER = Path(benchmarks.__file__).parent


def has_main(path: Path) -> bool:
    return any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in ast.parse(path.read_text("utf-8")).body)


def test_every_benchmark_with_a_main_is_registered_once():
    modules = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__main__" and has_main(path))
    assert sorted(each.name for each in BENCHMARKS) == modules


def test_each_benchmark_has_a_purpose_and_quick_runs_without_arguments_are_short():
    for each in BENCHMARKS:
        assert each.compares and each.minutes > 0
        assert each.quick or each.quick is None or each.minutes < 2, (
            f"{each.name}: a quick run of the defaults takes {each.minutes} minutes"
        )


def test_list_prints_all_benchmarks_and_quick_fewer(capsys):
    assert main(["--list"]) == 0
    every = capsys.readouterr().out.splitlines()
    assert main(["--list", "--quick"]) == 0
    quick = capsys.readouterr().out.splitlines()
    assert len(every) == len(BENCHMARKS) and 0 < len(quick) < len(every) and set(quick) < set(every)


def test_an_unknown_name_is_refused_before_anything_runs(capsys):
    with pytest.raises(SystemExit):
        main(["rogue"])
    assert "no benchmark is called rogue" in capsys.readouterr().err


@pytest.mark.parametrize("name", [each.name for each in BENCHMARKS])
def test_no_benchmark_has_a_required_argument(name):
    required = []
    for node in ast.walk(ast.parse((FOLDER / f"{name}.py").read_text("utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.startswith("add_"):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            names = [ast.literal_eval(each) for each in node.args]
            positional = node.func.attr == "add_argument" and not names[0].startswith("-") and given.get("nargs") not in ("'?'", "'*'")
            if positional or given.get("required") == "True":
                required.append(names or node.func.attr)
    assert required == []
