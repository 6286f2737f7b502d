"""Task names and labels of the plots, and their SVG."""

import re

import numpy as np
import pytest

from evaluation import plots

METHODS = ("greedy", "scorer", "oracle")


def estimates(*means):
    return {method: {"mean": mean, "low": mean - 1, "high": mean + 1} for method, mean in zip(METHODS, means, strict=True)}


def results(tasks):
    per_task = {f"task_{number}": {"methods": estimates(20, 30, 50)} for number in range(tasks)}
    return {"methods": list(METHODS), "averages": estimates(20, 30, 50), "per_task": per_task}


@pytest.mark.parametrize(
    ("name", "wrapped"),
    [
        ("tense", "tense"),
        ("mult_data_wrangling", "mult_data_\nwrangling"),
        ("a" * 30, "a" * 15 + "…"),
        ("one_task_with_more_parts_than_three_lines_can_hold", "one_task_\nwith_more_\nparts_than_"),
    ],
)
def test_a_task_name_is_wrapped_at_underscores_and_cut_to_three_lines(name, wrapped):
    assert plots._wrap_name(name) == wrapped


@pytest.mark.parametrize("heights", [[1.0, 1.0, 1.0], [5.0, 1.0, 1.2, 4.9], [0.0], [3.0, 2.0, 1.0]])
def test_labels_keep_their_order_and_their_distance(heights):
    placed = plots._spread_heights(heights, 0.5)
    order = np.argsort(heights, kind="stable")
    assert (np.diff(np.asarray(placed)[order]) >= 0.5 - 1e-3).all()
    if min(np.diff(np.sort(heights)), default=1) >= 0.5:
        assert placed == heights


def test_equal_numbers_give_equal_svg_with_the_colours_of_the_page():
    svg = plots.plot_bars(results(3))
    assert svg == plots.plot_bars(results(3))
    assert svg.startswith('<svg role="img" aria-label="Rouge-L of each method on each task, with intervals"')
    for method in METHODS:
        assert f"var(--plot-{method})" in svg
    assert "currentColor" in svg and not re.search(r"#0[0-9a-f]{5}\b", svg)
    assert all(found == "bars-" for found in re.findall(r'\bid="(bars-)?', svg))


def test_many_tasks_are_shown_in_several_panels():
    def panels(tasks):
        return plots.plot_bars(results(tasks)).count("Rouge-L, points")

    assert [panels(tasks) for tasks in (1, 8, 9, 30)] == [1, 1, 2, 4]
