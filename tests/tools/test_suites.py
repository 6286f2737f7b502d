"""The generated page of the test suites."""

from pathlib import Path

import pytest

from tools import suites

MODULE = "import pytest\npytestmark = [pytest.mark.slow, pytest.mark.usefixtures('x')]\n\ndef test_a(): ...\n"
FUNCTIONS = """
import pytest

@pytest.mark.slow
async def test_async(): ...

def test_plain(): ...

@pytest.mark.slow
@pytest.mark.full
def test_both(): ...

@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.full)])
def test_one_parameter_set(n): ...

class TestGroup:
    @pytest.mark.full
    def test_method(self): ...

def helper(): ...
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "tests" / "package"
    folder.mkdir(parents=True)
    (folder / "test_module.py").write_text(MODULE)
    (folder / "test_functions.py").write_text(FUNCTIONS)
    (folder / "helpers.py").write_text(FUNCTIONS)
    return tmp_path


def test_markers_of_module_function_class_and_parameter_set_count(root):
    assert [(test.path.rsplit("/", 1)[1], test.name, test.marker) for test in suites.marked_tests(root)] == [
        ("test_functions.py", "test_async", "slow"),
        ("test_functions.py", "test_both", "full"),
        ("test_functions.py", "test_one_parameter_set", "full"),
        ("test_functions.py", "test_method", "full"),
        ("test_module.py", "test_a", "slow"),
    ]


def test_page_lists_the_marked_tests_under_their_suite(root):
    full, slow = suites.tests_page(root).split("## In `make test`")
    assert "`test_both`" in full and "`test_async`" not in full
    assert "`test_async`" in slow and "`test_plain`" not in slow


def test_page_states_that_a_marker_is_unused(tmp_path):
    page = suites.tests_page(tmp_path)
    assert "No test has the marker `full`" in page and "No test has the marker `slow`" in page


def test_pytest_and_the_page_agree_on_this_repository(pytestconfig):
    """Every marker of the page is registered, and the page has the marked tests of this repository."""
    registered = {line.split(":")[0] for line in pytestconfig.getini("markers")}
    assert set(suites.MARKERS) <= registered
    listed = {(test.path, test.name) for test in suites.marked_tests()}
    assert ("tests/serving/test_app.py", "test_only_loopback_is_bound_and_sigterm_ends_server_and_engine") in listed
