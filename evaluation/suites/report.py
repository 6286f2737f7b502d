"""The results of a suite as one self-contained HTML page: tables, gain per task, cost curves, provenance. Uses no files, no network.

The page is a function of the published `results.json`. All text from a model or a data set is escaped.
"""

from __future__ import annotations

from typing import Any

import jinja2
from markupsafe import Markup

from evaluation import plots
from evaluation.report_template import page_start

_PAGE = (
    page_start("Cappy suite")
    + """\
<header>
  <h1>{{ titles[headline] }}: {{ results.averages[headline].mean|fixed }} points</h1>
  <p class="soft">{{ "Rouge-L of the answer" if results.suite.kind == "sampled" else "Accuracy" }}, 0 to 100, averaged over
  {{ results.tasks }} tasks with equal weights: {{ results.rows|count }} rows. Intervals of {{ level }}: over rows within tasks,
  and over tasks.</p>
</header>

<h2>Average over tasks, and gain of each trained method over each baseline</h2>
<div class="panel"><table>
<thead><tr><th>Method</th><th>Points</th>
{% for method in results.gains %}<th>Gain of {{ titles[method]|lower }}</th>{% endfor %}</tr></thead><tbody>
{% for method, estimate in results.averages.items() %}
<tr><td>{{ titles[method] }}</td><td>{{ estimate.mean|fixed }}<span class="range">{{ range(estimate) }}</span></td>
{% for trained in results.gains %}{% set gain = results.gains[trained].get(method) %}
<td>{% if gain %}{{ gain.mean|signed }}<span class="range">rows {{ gain.low|signed }} to {{ gain.high|signed }}</span>
<span class="range">tasks {{ gain.low_tasks|signed }} to {{ gain.high_tasks|signed }}</span>
<span class="range">{{ gain.tasks.wins }} tasks better, {{ gain.tasks.ties }} equal, {{ gain.tasks.losses }} worse</span>{% endif %}</td>
{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% for method, reason in results.left_out.items() %}<p class="soft small">{{ method }} is left out: {{ reason }}.</p>{% endfor %}

{% if results.oracle_gap %}
<h2>Share of the gap to the oracle</h2>
<p class="soft">(method &minus; baseline) / (oracle &minus; baseline) of the averages, in percent.</p>
<div class="panel"><table>
<thead><tr><th>From</th>{% for method in results.oracle_gap %}<th>{{ titles[method] }}</th>{% endfor %}</tr></thead><tbody>
{% for baseline in gap_baselines %}<tr><td>{{ titles[baseline] }}</td>
{% for method, shares in results.oracle_gap.items() %}{% set share = shares[baseline] %}
<td>{% if share %}{{ (100 * share.mean)|fixed }}<span class="range">rows {{ (100 * share.low)|fixed }} to
{{ (100 * share.high)|fixed }}</span><span class="range">tasks {{ (100 * share.low_tasks)|fixed }} to
{{ (100 * share.high_tasks)|fixed }}</span>{% else %}–{% endif %}</td>
{% endfor %}</tr>{% endfor %}
</tbody></table></div>
{% endif %}

<h2>Gain of each task</h2>
<p class="soft">{{ titles[headline] }} minus {{ titles[rival]|lower }}, with intervals over rows.</p>
<div class="panel wide">{{ figures.gains }}</div>

{% if figures.cost %}
<h2>Points against cost</h2>
<p class="soft">Pools of the first k candidates in the order of sampling. Tokens are sampled tokens per instruction.</p>
<div class="panel wide">{{ figures.cost }}</div>
<div class="panel"><table>
<thead><tr><th>Candidates</th><th>Tokens</th><th>Sampling, s</th><th>Scoring, s</th>
{% for method in results.cost[0].points %}<th>{{ titles.get(method, method) }}</th>{% endfor %}</tr></thead><tbody>
{% for each in results.cost %}<tr><td>{{ each.candidates|fixed }}
{% if each.min_gain is not none %}, early stopping at {{ each.min_gain }}
{% endif %}</td><td>{{ each.tokens|fixed }}</td>
<td>{{ "–" if each.sampling_seconds is none else each.sampling_seconds|fixed(2) }}</td>
<td>{{ "–" if each.scoring_seconds is none else each.scoring_seconds|fixed(2) }}</td>
{% for estimate in each.points.values() %}<td>{{ estimate.mean|fixed }}<span class="range">{{ range(estimate) }}</span></td>
{% endfor %}</tr>{% endfor %}
</tbody></table></div>
{% endif %}

<h2>Every method on every task</h2>
<div class="panel"><table class="methods">
<thead><tr><th>Task</th><th>Rows</th>{% for method in results.averages %}<th>{{ titles[method] }}</th>{% endfor %}
{% if results.suite.paper %}<th>Paper</th>{% endif %}</tr></thead><tbody>
{% for task, entry in results.per_task.items() %}
<tr><td>{{ task }}</td><td>{{ entry.rows|count }}</td>
{% for estimate in entry.methods.values() %}<td>{{ estimate.mean|fixed }}<span class="range">{{ range(estimate) }}</span></td>{% endfor %}
{% if results.suite.paper %}<td>{{ results.suite.paper[task]|fixed if task in results.suite.paper else "–" }}</td>{% endif %}</tr>
{% endfor %}
</tbody></table></div>

{% for name, groups in results.get("calibration", {}).items() %}
{% if loop.first %}<h2>Calibration</h2><p class="soft">Groups of equal size by score: mean score and mean label.</p>{% endif %}
<div class="panel"><table><thead><tr><th>{{ titles.get(name, name) }}</th>
{% for group in groups %}<th>{{ loop.index }}</th>{% endfor %}</tr></thead><tbody>
<tr><td>score</td>{% for group in groups %}<td>{{ group.score|fixed(2) }}</td>{% endfor %}</tr>
<tr><td>label</td>{% for group in groups %}<td>{{ group.value|fixed(2) }}</td>{% endfor %}</tr></tbody></table></div>
{% endfor %}

<h2>Time and memory</h2>
<div class="panel"><table><thead><tr><th>Step</th><th>Minutes</th><th>Peak memory, GiB</th></tr></thead><tbody>
{% for step, measured in results.steps.items() %}<tr><td>{{ step }}</td><td>{{ (measured.seconds / 60)|fixed }}</td>
<td>{{ measured.peak_memory_gib|fixed }}</td></tr>{% endfor %}
</tbody></table></div>

<h2>Provenance</h2>
<div class="panel small"><dl>
<dt>Set</dt><dd>{{ made.dataset or "–" }}</dd><dt>Zero-shot scorer</dt><dd>{{ made.scorer or "–" }}</dd>
<dt>Seed</dt><dd>{{ made.seed }}</dd><dt>Code</dt><dd>{{ made.code_version }}</dd><dt>Created</dt><dd>{{ made.created }}</dd>
</dl></div>
</main>
</body>
</html>
"""
)


def render_suite(results: dict[str, Any]) -> str:
    """Return the page for the `results` of `evaluation.suites.run`."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["signed"] = lambda value, digits=1: f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")
    environment.filters["fixed"] = lambda value, digits=1: f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")
    environment.filters["count"] = lambda value: f"{value:,}"
    headline, rival = results["headline"], results["rival"]
    gains = {task: entry["gains"].get(headline, {}).get(rival) for task, entry in results["per_task"].items()}
    figures = {
        "gains": plots.plot_gains({task: gain for task, gain in gains.items() if gain}),
        "cost": plots.plot_cost(results["cost"], results["titles"]) if results.get("cost") else "",
    }
    shares: dict[str, Any] = next(iter(results["oracle_gap"].values()), {})
    return environment.from_string(_PAGE).render(
        results=results,
        titles=results["titles"],
        headline=headline,
        rival=rival,
        gap_baselines=[name for name in ("greedy", "consensus", rival) if name in shares],
        figures={name: Markup(svg) for name, svg in figures.items()},
        made=results["made"],
        level=f"{results['confidence']:.0%}",
    )
