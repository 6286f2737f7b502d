from generation.units import Gate


def test_below_a_ceiling_a_unit_waits_for_those_in_flight_and_is_refused_only_when_none_is():
    gate = Gate(ceiling=1.0)
    assert gate.enter("a", 0.7) is True
    assert gate.enter("b", 0.7) is None and not gate.exhausted()
    gate.leave("a", 0.2)
    assert gate.enter("b", 0.7) is True
    gate.leave("b", 0.5)
    assert gate.enter("c", 0.7) is False and gate.exhausted()


def test_a_unit_found_done_after_its_actor_was_lost_frees_its_promise_once():
    gate = Gate(ceiling=1.0)
    assert gate.enter("a", 0.9) is True
    gate.leave("a", 0.5)
    gate.leave("a", 0.5)
    assert gate.enter("b", 0.5) is True


def test_a_closed_gate_lets_nobody_in():
    gate = Gate()
    assert gate.enter("a", 0.0) is True
    gate.close()
    assert gate.enter("b", 0.0) is False and not gate.exhausted()
