from cluster.progress import Bar


def test_a_line_has_rates_and_an_eta_after_the_second_result(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with Bar("sampling", 40, "rows") as bar:
        now[0] += 60  # an LLM loads
        bar.advance(10, tokens=500)
        now[0] += 10
        bar.advance(10, tokens=1000)
        now[0] += 10
        bar.advance(20, note="2 dead letters", tokens=2000)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "sampling: 0/40 rows",
        "sampling: 10/40 rows",
        "sampling: 20/40 rows  1.0 rows/s  100 tokens/s  eta 20 s",
        "sampling: 40/40 rows  1.5 rows/s  150 tokens/s  2 dead letters  in 80 s",
    ]


def test_rates_of_work_with_a_known_start_count_the_first_result_too(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with Bar("sampling", 50, "rows", done=10) as bar:
        now[0] += 60  # an LLM loads for 20 s, and then the first unit is sampled
        bar.start_rates(40)
        bar.advance(20, tokens=400)
        bar.advance(10, tokens=400)
    assert bar.rates() == {"rows": 0.75, "tokens": 20.0}
    assert capsys.readouterr().err.splitlines()[1] == "sampling: 30/50 rows  0.5 rows/s  10 tokens/s  eta 40 s"
