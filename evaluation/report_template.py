"""The Jinja2 template of the report's page, with its style sheet. It is a Python string, so every package build contains it.

Filters beside Jinja2's: `fixed(digits)`, `signed(digits)`, `count` (thousands separators), `clip` (long text); see
`report.render_report`.
"""

STYLE = """\
:root {
  --page: #f6f6f3; --card: #ffffff; --ink: #1d2126; --soft: #626a74; --line: #e2e2dc; --accent: #c8451b;
  --good: #1b7f4d; --bad: #b3261e; --good-wash: #e3f3ea; --bad-wash: #fbe7e5; --wash: #eeeee9;
  --plot-greedy: #6d7a8c; --plot-sample: #b4bcc7; --plot-self_sum: #3f7fb5; --plot-self_mean: #8fbfe3;
  --plot-consensus: #7a6fb8; --plot-fitted: #a8321f; --plot-fitted_no_scorer: #c98a7f;
  --plot-scorer: #d9501f; --plot-blend: #e39a3b; --plot-oracle: #1d8a63; --plot-random: #a3a9b2;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --card: #1c2024; --ink: #e6e7e4; --soft: #9aa2ab; --line: #2d3238; --accent: #ff8a5c;
    --good: #5fd39a; --bad: #ff8f86; --good-wash: #17352a; --bad-wash: #3d201e; --wash: #262b30;
    --plot-greedy: #8d9bb0; --plot-sample: #566070; --plot-self_sum: #4f9ad6; --plot-self_mean: #a5d2f3;
    --plot-consensus: #a89ee0; --plot-fitted: #ff9a7a; --plot-fitted_no_scorer: #a5685a;
    --plot-scorer: #ff7a45; --plot-blend: #f0b35e; --plot-oracle: #4fcf9c; --plot-random: #727a85;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", Arial, sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 48px 24px 80px; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -.02em; margin: 0 0 8px; text-wrap: balance; }
h2 { font-size: 1.25rem; letter-spacing: -.01em; margin: 56px 0 4px; }
p { margin: 0 0 12px; max-width: 72ch; }
.soft { color: var(--soft); }
.small { font-size: .8125rem; }
.mono { font: .8125rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 16px; margin-top: 28px; }
.card, .panel { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.card { font-variant-numeric: tabular-nums; padding: 18px 20px; display: flex; flex-direction: column; }
.card .name { color: var(--soft); font-size: .8125rem; }
.card .value { margin-top: auto; font-size: 2.1rem; font-weight: 650; letter-spacing: -.03em; line-height: 1.25; }
.card .value small { font-size: 1rem; font-weight: 500; letter-spacing: 0; color: var(--soft); }
.card.main { border-color: var(--accent); }
.card.main .value { color: var(--accent); }
.panel { padding: 16px 18px; margin-top: 14px; overflow-x: auto; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 32px 20px; }
.pair section { display: flex; flex-direction: column; }
.pair .panel { margin-top: auto; }
svg { display: block; width: 100%; height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: inherit !important; }
.wide svg { min-width: 760px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 10px; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-size: .8125rem; font-weight: 600; color: var(--soft); vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 2px; }
tbody tr:last-child td { border-bottom: 0; }
.methods th, .methods td { padding: 7px 3px; }
.methods td:first-child { min-width: 7.5em; overflow-wrap: anywhere; }
tr.average td { border-top: 2px solid var(--line); font-weight: 600; border-bottom: 0; }
td .range { display: block; font-size: .75rem; font-weight: 400; color: var(--soft); white-space: nowrap; }
td.best { color: var(--accent); font-weight: 700; }
td.oracle, td.quality { color: var(--soft); }
.text { text-align: left; white-space: pre-wrap; overflow-wrap: anywhere; }
details { background: var(--card); border: 1px solid var(--line); border-radius: 12px; margin-top: 10px; }
summary { display: flex; gap: 12px; align-items: baseline; padding: 12px 16px; cursor: pointer; list-style: none; }
summary::-webkit-details-marker { display: none; }
summary::before { content: "›"; color: var(--soft); font-weight: 700; transition: transform .12s; }
details[open] > summary::before { transform: rotate(90deg); }
summary .task { font-weight: 600; white-space: nowrap; }
summary .gist { flex: 1 1 0; min-width: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; color: var(--soft); }
summary .numbers { white-space: nowrap; font-variant-numeric: tabular-nums; }
.inside { padding: 2px 18px 14px; overflow-x: auto; }
.inside table { min-width: 640px; }
.inside th { white-space: nowrap; }
.inside .label { color: var(--soft); font-size: .75rem; font-weight: 600; margin: 10px 0 2px; }
.instruction { background: var(--wash); border-radius: 8px; padding: 10px 12px; max-height: 18em; overflow-y: auto; }
.references { margin: 0; padding-left: 1.2em; }
.badge {
  display: inline-block; min-width: 3.6em; text-align: center; border-radius: 99px; padding: 1px 9px; font-size: .75rem;
  font-weight: 650;
}
.badge.win { background: var(--good-wash); color: var(--good); }
.badge.loss { background: var(--bad-wash); color: var(--bad); }
.badge.tie { background: var(--wash); color: var(--soft); }
.chip {
  display: inline-block; border: 1px solid color-mix(in srgb, var(--soft) 45%, transparent); border-radius: 99px;
  padding: 0 8px; margin: 0 0 2px 2px; font-size: .75rem; white-space: nowrap; color: var(--soft);
}
.chip.scorer { background: var(--accent); border-color: var(--accent); color: var(--card); font-weight: 650; }
.chip.oracle { border-color: var(--good); color: var(--good); }
tr.chosen td { background: color-mix(in srgb, var(--accent) 7%, transparent); }
.bar { display: block; height: 4px; border-radius: 2px; background: var(--wash); margin-top: 4px; min-width: 56px; }
.bar i { display: block; height: 100%; border-radius: 2px; background: var(--good); }
dl { display: grid; grid-template-columns: minmax(120px, 190px) 1fr; gap: 6px 18px; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
.buttons { float: right; display: flex; gap: 8px; margin-top: 2px; }
button {
  font: inherit; font-size: .8125rem; color: var(--ink); background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 3px 10px; cursor: pointer;
}
@media (max-width: 640px) {
  main { padding: 28px 14px 60px; }
  h1 { font-size: 1.5rem; }
  summary { flex-wrap: wrap; }
  summary .gist { flex-basis: 100%; order: 3; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 8px; }
}
@media print { body { background: #fff; } .buttons { display: none; } .panel, .card, details { break-inside: avoid; } }
"""


def page_start(title: str) -> str:
    """Return the template of the start of a page, up to `<main>`. `title` is a template too. Defines the macro `range(estimate)`."""
    return f"""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{STYLE}</style>
</head>
<body>
<main>
{{% macro range(estimate) %}}{{{{ estimate.low|fixed }}}} – {{{{ estimate.high|fixed }}}}{{% endmacro %}}
"""


PAGE = (
    """\
{% set rival = names[best]|lower %}
{% set made = results.made %}
"""
    + page_start("Cappy evaluation: {{ results.gain.mean|signed }} points over {{ rival }}")
    + """\

<header>
  <h1>
  {% if results.gain.low > 0 %}The scorer's picks beat {{ rival }} by {{ results.gain.mean|fixed }} points
  {% elif results.gain.high < 0 %}The scorer's picks fall {{ (-results.gain.mean)|fixed }} points short of {{ rival }}
  {% else %}No clear difference between the scorer's picks and {{ rival }}
  {% endif %}
  </h1>
  <p class="soft">Rouge-L of the answer, 0 to 100, averaged over {{ results.tasks }} task{{ "" if results.tasks == 1 else "s" }}:
  {{ results.instructions|count }} {{ made.split }} instructions, {{ results.candidates|count }} candidates sampled from
  {{ made.sampler.model }}. Ranges are {{ interval }} bootstrap intervals.</p>
</header>

<div class="cards">
  <div class="card main"><div class="name">Scorer</div><div class="value">{{ results.averages.scorer.mean|fixed }}</div>
    <div class="soft small">{{ range(results.averages.scorer) }}</div></div>
  <div class="card"><div class="name">Best baseline: {{ rival }}</div><div class="value">{{ results.averages[best].mean|fixed }}</div>
    <div class="soft small">{{ range(results.averages[best]) }}</div></div>
  <div class="card"><div class="name">Gain over it</div><div class="value">{{ results.gain.mean|signed }}</div>
    <div class="soft small">{{ results.gain.low|signed }} to {{ results.gain.high|signed }}</div></div>
  <div class="card"><div class="name">Oracle</div><div class="value">{{ results.averages.oracle.mean|fixed }}</div>
    <div class="soft small">{{ range(results.averages.oracle) }}</div></div>
  <div class="card"><div class="name">Oracle gap closed</div>
    {% if results.gap_closed %}
    <div class="value">{{ (100 * results.gap_closed.mean)|fixed(0) }}<small> %</small></div>
    <div class="soft small">{{ (100 * results.gap_closed.low)|signed(0) }} to {{ (100 * results.gap_closed.high)|signed(0) }} %</div>
    {% else %}
    <div class="value">–</div><div class="soft small">the oracle is not above the best baseline</div>
    {% endif %}
  </div>
</div>

<h2>Every method on every task</h2>
<p class="soft">All methods pick from the same candidates; the oracle picks by the references. Lines are {{ interval }} intervals.</p>
<div class="panel wide">{{ figures.bars }}</div>
<div class="panel">
<table class="methods">
<thead><tr><th>Task</th><th>Rows</th>{% for method in results.methods %}<th>{{ names[method] }}</th>{% endfor %}
<th title="Spearman correlation of score and Rouge-L within an instruction, averaged over instructions">Spearman</th>
<th title="Share of candidate pairs with different Rouge-L within an instruction that the score orders correctly">Pairs right</th>
<th title="Mean squared error of the score">MSE</th></tr></thead>
<tbody>
{% macro cells(estimates, quality) %}
{% set top = estimates|dictsort|rejectattr(0, "equalto", "oracle")|map(attribute=1)|map(attribute="mean")|max %}
{% for method in results.methods %}
{% set kind = "oracle" if method == "oracle" else "best" if estimates[method].mean == top %}
<td class="{{ kind }}">{{ estimates[method].mean|fixed }}<span class="range">{{ range(estimates[method]) }}</span></td>
{% endfor %}
<td class="quality">{{ "–" if quality.spearman is none else quality.spearman|fixed(2) }}</td>
<td class="quality">{{ "–" if quality.pairwise_accuracy is none else (100 * quality.pairwise_accuracy)|fixed(0) ~ " %" }}</td>
<td class="quality">{{ quality.mse|fixed(3) }}</td>
{% endmacro %}
{% for task, entry in results.per_task.items() %}
<tr><td>{{ task }}</td><td>{{ entry.instructions|count }}</td>{{ cells(entry.methods, entry.quality) }}</tr>
{% endfor %}
<tr class="average"><td>Average over tasks</td><td>{{ results.instructions|count }}</td>{{ cells(results.averages, results.quality) }}</tr>
</tbody></table></div>
<p class="soft small" style="margin-top:10px">Against {{ rival }}, instruction by instruction: {{ results.outcomes.wins|count }} wins,
{{ results.outcomes.ties|count }} ties, {{ results.outcomes.losses|count }} losses.
{% for method, reason in results.left_out.items() %} {{ names[method] }} is left out: {{ reason }}.{% endfor %}</p>

<h2>Gain of each task</h2>
<p class="soft">{{ names[headline] }} minus {{ rival }}, paired by instruction, with {{ interval }} intervals.</p>
<div class="panel wide">{{ figures.gains }}</div>

<h2>Gain against number of candidates</h2>
<p class="soft">Exact expected Rouge-L of the pick from k random candidates of the pool.
The band of the scorer is its {{ interval }} interval.</p>
<div class="panel wide">{{ figures.curves }}</div>

<div class="pair">
<section><h2>Rouge-L of candidates and picks</h2>
<p class="soft small">Share of candidates, and of picks, by their Rouge-L with the references.</p>
<div class="panel">{{ figures.labels }}</div></section>
<section><h2>Score against true Rouge-L</h2>
<p class="soft small">A stronger colour means more candidates, on a logarithmic scale.
The score is the raw output of the regression.</p>
<div class="panel">{{ figures.scores }}</div></section>
</div>

{% if examples %}
<h2>Examples <span class="buttons"><button type="button" data-open="1">Open all</button>
<button type="button" data-open="">Close all</button></span></h2>
<p class="soft">Wins, losses and ties of the scorer against {{ rival }} in turn, drawn by seed. The mix is even, not representative.</p>
{% for each in examples %}
<details{% if loop.index <= 2 %} open{% endif %}>
<summary><span class="badge {{ each.outcome }}">{{ each.outcome }}</span><span class="task">{{ each.dataset }}</span>
<span class="gist">{{ each.instruction|truncate(160, True) }}</span>
<span class="numbers small">scorer {{ each.scorer|fixed(0) }} · {{ rival }} {{ each.baseline|fixed(0) }} ·
oracle {{ each.oracle|fixed(0) }}</span></summary>
<div class="inside">
<div class="label">Instruction</div><div class="text small instruction">{{ each.instruction|clip }}</div>
<div class="label">References</div>
<ul class="references small">{% for text in each.references %}<li class="text">{{ text|clip }}</li>{% endfor %}</ul>
<div class="label">Candidates, best score first</div>
<table class="small">
<thead><tr><th>Response</th><th>Picked by</th>
<th>Score</th><th>Rouge-L</th><th>Mean log-prob.</th><th>Decoding</th></tr></thead><tbody>
{% for candidate in each.candidates %}
<tr class="{{ "chosen" if "scorer" in candidate.picks }}">
<td class="text">{{ candidate.response|clip if candidate.response else "(empty)" }}</td>
<td>{% for method in candidate.picks %}<span class="chip {{ method }}">{{ names[method]|lower }}</span>{% endfor %}</td>
<td>{{ candidate.score|fixed(3) }}</td>
<td>{{ (100 * candidate.label)|fixed(0) }}
<span class="bar"><i style="width:{{ (100 * candidate.label)|fixed(0) }}%"></i></span></td>
<td>{{ "–" if candidate.mean_logprob is none else candidate.mean_logprob|fixed(2) }}</td>
<td class="soft">{{ candidate.decodings|select|join(", ") }}{% if candidate.times > 1 %} ×{{ candidate.times }}{% endif %}</td></tr>
{% endfor %}
</tbody></table>
</div></details>
{% endfor %}
{% endif %}

<h2>Provenance</h2>
<p class="soft">The folder of this page has the resolved configuration (config.yaml) and the numbers (results.json, rows.parquet).</p>
<div class="panel small"><dl>
<dt>Language model</dt><dd>{{ made.sampler.model }}</dd>
<dt>Prompt</dt><dd>{{ made.sampler.prompt.form }}
{%- if made.sampler.prompt.shots %}, {{ made.sampler.prompt.shots }} shots from train rows{% endif %}
{%- if made.sampler.prompt.system %}, system text: {{ made.sampler.prompt.system|clip }}{% endif %}</dd>
<dt>Decodings</dt><dd>
{% for each in made.sampler.decodings %}
<div>{{ each.name }}: {{ each.n }} × temperature {{ each.temperature }}
{%- if each.top_k %}, top-k {{ each.top_k }}{% endif %}
{%- if each.top_p < 1 %}, top-p {{ each.top_p }}{% endif %}, up to {{ each.max_tokens }} tokens
{%- if each.stop %}, stop {% for text in each.stop %}<code>{{ text|tojson|forceescape }}</code> {% endfor %}{% endif %}</div>
{% endfor %}
</dd>
{% if made.encoder %}<dt>Encoder</dt><dd>{{ made.encoder }}</dd>{% endif %}
<dt>Scorer</dt><dd class="mono">{{ made.scorer }}</dd>
<dt>Data</dt><dd class="mono">{{ made.dataset }}</dd>
<dt>Candidates</dt><dd>{{ results.candidates|count }}, of them
{{ results.distinct_candidates|count }} distinct within their instruction</dd>
<dt>Rows skipped</dt><dd>{{ results.skipped.without_samples|count }} without sampled candidates,
{{ results.skipped.incomplete|count }} without a candidate for every method</dd>
<dt>Intervals</dt><dd>{{ interval }}, {{ results.resamples|count }} bootstrap resamples of instructions within each task</dd>
<dt>Seed</dt><dd>{{ results.seed }}</dd>
<dt>Command</dt><dd class="mono">{{ made.command }}</dd>
<dt>Made</dt><dd>{{ made.created }} by cappy-ray {{ made.code_version }}</dd>
</dl></div>
</main>
<script>
for (const button of document.querySelectorAll("[data-open]"))
  button.onclick = () => document.querySelectorAll("details").forEach((each) => { each.open = Boolean(button.dataset.open); });
</script>
</body>
</html>
"""
)
