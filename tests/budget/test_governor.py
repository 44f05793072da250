"""What weights may take follows the budget, what else is held, and what the system has to give."""

from __future__ import annotations

import logging

import pytest

from blockstream.budget.amounts import headroom_part
from blockstream.budget.governor import GUARD_NBYTES, Governor, margin_nbytes
from blockstream.errors import BudgetError
from blockstream.system.limits import Headroom, Limit
from blockstream.system.memory import Held

MIB = 1 << 20


class Machine:
    """A process on a machine: what it holds, its arena, what is free."""

    def __init__(self, held=300 * MIB, free=4000 * MIB, source="available memory"):
        self.held, self.free, self.touched, self.mapped, self.others = held, free, 0, 0, 0
        self.source, self.now, self.looks = source, 0.0, 0

    def look(self):
        self.looks += 1
        return Headroom((Limit(self.source, 10_000 * MIB, 10_000 * MIB - self.free),))

    def governor(self, budget):
        return Governor(
            budget,
            touched_nbytes=lambda: self.touched,
            mapped_nbytes=lambda: self.mapped,
            others_nbytes=lambda: self.others,
            look=self.look,
            read=lambda: Held(self.held, self.held),
            clock=lambda: self.now,
        )

    def load(self, nbytes):
        """Fill the arena by some bytes."""
        self.touched += nbytes
        self.held += nbytes
        self.free -= nbytes

    def take(self, nbytes):
        """Have another process take memory, and time pass."""
        self.free -= nbytes
        self.now += 1


@pytest.fixture
def machine(monkeypatch):
    made = Machine()
    monkeypatch.setattr("blockstream.budget.amounts.held", lambda: Held(made.held, made.held))
    return made


def test_weights_get_an_amount_less_what_is_outside_the_arena_and_a_margin(machine):
    governor = machine.governor("1000MiB")
    assert governor.weights_nbytes() == 1000 * MIB - 300 * MIB - margin_nbytes(1000 * MIB)
    machine.load(500 * MIB)
    assert governor.weights_nbytes() == 1000 * MIB - 300 * MIB - margin_nbytes(1000 * MIB)


def test_weights_of_other_sessions_to_come_are_left_room(machine):
    governor = machine.governor("1000MiB")
    before = governor.weights_nbytes()
    machine.others = 100 * MIB
    assert governor.weights_nbytes() == before - 100 * MIB


def test_an_amount_above_what_there_is_warns_and_keeps_to_what_there_is(machine, caplog):
    machine.free = 500 * MIB
    with caplog.at_level(logging.WARNING):
        governor = machine.governor("3GiB")
    assert "3.0 GiB is above" in caplog.text
    assert governor.ceiling_nbytes() == 800 * MIB - GUARD_NBYTES


def test_auto_takes_four_fifths_of_the_headroom_before_the_session_and_follows_it(machine):
    governor = machine.governor("auto")
    governor.base_nbytes = machine.held
    first = governor.ceiling_nbytes()
    assert first == 300 * MIB + int(0.8 * 4000 * MIB)
    machine.load(2000 * MIB)
    machine.now += 1
    assert governor.ceiling_nbytes() == first
    machine.take(1000 * MIB)
    assert governor.ceiling_nbytes() == first - 800 * MIB
    machine.take(-1500 * MIB)
    assert governor.ceiling_nbytes() == first + 400 * MIB


def test_small_movements_are_within_the_slack(machine):
    governor = machine.governor("auto")
    planned = governor.weights_nbytes()
    machine.take(200 * MIB)
    assert governor.weights_nbytes() < planned <= governor.weights_nbytes(slack=True)
    machine.take(1000 * MIB)
    assert governor.weights_nbytes(slack=True) < planned


def test_the_headroom_is_looked_at_rarely_and_what_is_taken_between_counts(machine):
    governor = machine.governor("3GiB")
    machine.free = 1000 * MIB
    ceiling = governor.ceiling_nbytes()
    looks = machine.looks
    machine.load(400 * MIB)
    assert governor.ceiling_nbytes() == ceiling
    assert machine.looks == looks
    machine.now += 1
    assert governor.is_due()
    governor.ceiling_nbytes()
    assert machine.looks == looks + 1 and not governor.is_due()


def test_mapped_but_untouched_arena_is_no_use_of_address_space(machine):
    machine.source = "RLIMIT_AS"
    machine.free = 100 * MIB
    governor = machine.governor("3GiB")
    machine.mapped = 600 * MIB
    assert governor.ceiling_nbytes() == 1000 * MIB - GUARD_NBYTES


def test_the_named_least_is_enough_and_one_percent_less_is_refused(machine):
    least, outside, largest = 800 * MIB, 350 * MIB, ("t5.block.07", 400 * MIB)
    with pytest.raises(BudgetError) as refused:
        machine.governor("1000MiB").refuse(least, outside, largest, 2)
    words = str(refused.value)
    assert "2 slots of the largest segment (t5.block.07, 400 MiB)" in words
    assert "beside 350 MiB of runtime and activations" in words
    named = int(words.split("the least is ")[1].removesuffix(" MiB"))
    machine.governor(f"{named}MiB").refuse(least, outside, largest, 2)
    with pytest.raises(BudgetError):
        machine.governor(int(named * MIB * 0.99)).refuse(least, outside, largest, 2)


def test_a_refusal_for_want_of_memory_says_who_limits_it(machine):
    machine.free, machine.source = 200 * MIB, "cgroup v1 memory.limit_in_bytes of /job"
    with pytest.raises(BudgetError, match=r"budget 2\.0 GiB, of which 484 MiB are to be had under cgroup v1"):
        machine.governor("2GiB").refuse(800 * MIB, 350 * MIB, ("b", 400 * MIB), 2)


def test_a_refusal_under_a_limit_names_the_limit_that_would_do(machine):
    """A budget equal to its control group's limit: the kernel's share and the others' come on top."""
    least, outside, largest = 800 * MIB, 350 * MIB, ("b", 400 * MIB)
    machine.source, limit = "cgroup v2 memory.max of /job", 1000 * MIB

    def governor(limit):
        machine.look = lambda: Headroom((Limit(machine.source, limit, machine.held + 30 * MIB),))
        return machine.governor(limit)

    with pytest.raises(BudgetError) as refused:
        governor(limit).refuse(least, outside, largest, 2)
    named = int(str(refused.value).split("that limit has to be ")[1].split(" MiB")[0]) * MIB
    governor(named).refuse(least, outside, largest, 2)
    with pytest.raises(BudgetError):
        governor(int(named * 0.99)).refuse(least, outside, largest, 2)


def watched(machine, budget, **more):
    governor = machine.governor(budget)
    governor.begin(every_s=60, read=lambda: Held(machine.held, machine.held), **more)
    return governor


def test_the_peak_is_split_by_cause_and_the_parts_sum_to_it(machine):
    governor = watched(machine, "1000MiB")
    machine.load(400 * MIB)
    governor.begin_pass()
    machine.held += 150 * MIB
    governor.sample("t5")
    machine.held -= 150 * MIB
    report = governor.report()
    governor.close()
    assert report["held"] and report["nbytes"] == 1000 * MIB
    assert report["by_cause"] == {
        "arena": 400 * MIB,
        "runtime": 300 * MIB,
        "activations": 150 * MIB,
        "other": 0,
    }
    assert sum(report["by_cause"].values()) == report["peak_nbytes"] == 850 * MIB


def test_what_was_outside_once_stays_reserved_until_the_next_stage(machine):
    governor = watched(machine, "1000MiB")
    free = governor.weights_nbytes()
    governor.begin_pass()
    machine.held += 100 * MIB
    governor.sample()
    assert governor.has_grown() and not governor.has_grown()
    machine.held -= 100 * MIB
    assert governor.weights_nbytes() == free - 100 * MIB
    governor.begin_stage()
    assert governor.weights_nbytes() == free
    governor.close()


def test_what_the_heap_gives_back_counts_but_for_what_a_visit_takes_again(machine, monkeypatch):
    governor = watched(machine, "1000MiB")
    monkeypatch.setattr("blockstream.budget.governor.trim_heap", lambda: setattr(machine, "held", 300 * MIB))
    free = governor.weights_nbytes()
    governor.begin_stage()

    def visit(takes, keeps, known=True):
        machine.held += takes * MIB
        governor.watch.sample()
        machine.held -= (takes - keeps) * MIB
        governor.sample(known=known)

    visit(takes=40, keeps=10, known=False)
    visit(takes=40, keeps=10)  # now blocks of each kind are known: together they took 10 + 40
    for _ in range(20):
        visit(takes=40, keeps=10)
    assert governor.weights_nbytes() == free - (210 + 40) * MIB
    governor.relieve()
    assert governor.weights_nbytes() == free - 50 * MIB
    visit(takes=50, keeps=0)
    assert governor.weights_nbytes() == free - 50 * MIB
    governor.close()


def test_expected_activations_are_left_room_before_they_are_seen(machine):
    governor = watched(machine, "1000MiB")
    free = governor.weights_nbytes()
    governor.begin_pass()
    governor.expect(250 * MIB)
    assert governor.weights_nbytes() == free - 250 * MIB
    governor.close()


def test_an_amount_that_is_exceeded_is_reported_broken(machine):
    governor = watched(machine, "400MiB")
    machine.held = 401 * MIB
    governor.sample()
    machine.held = 300 * MIB
    assert governor.report()["held"] is False
    governor.close()
    assert governor.report()["peak_nbytes"] == 401 * MIB


def test_auto_is_judged_by_what_is_left_once_it_was_followed(machine):
    governor = watched(machine, "auto")
    first = governor.watch.budget_nbytes
    machine.load(3000 * MIB)
    machine.take(900 * MIB)
    governor.watch.sample()
    assert not governor.watch.broken, "what was within the budget when it was taken"
    machine.load(-2000 * MIB)
    governor.follow()
    assert machine.held < governor.watch.budget_nbytes < first
    machine.take(-3000 * MIB)
    governor.follow()
    assert governor.watch.budget_nbytes >= first
    governor.close()


def test_auto_is_judged_by_the_ceiling_with_its_slack_where_the_headroom_has_moved(machine):
    governor = watched(machine, "auto")
    first = governor.watch.budget_nbytes
    governor.follow()
    assert governor.watch.budget_nbytes == first, "nothing has moved"
    for moved in (3000, -2000):
        machine.take(-moved * MIB)
        governor.follow()
        assert governor.watch.budget_nbytes == governor.ceiling_nbytes(slack=True) != first
    governor.close()


def test_what_is_held_above_the_last_ceiling_is_within_the_budget_if_there_is_more_now(machine):
    governor = watched(machine, "auto")
    first = governor.watch.budget_nbytes
    machine.take(-1000 * MIB)  # nobody has looked since
    machine.load(first + 500 * MIB - machine.held)
    governor.watch.sample()
    assert not governor.watch.broken and governor.watch.budget_nbytes > machine.held
    machine.load(governor.watch.budget_nbytes + 200 * MIB - machine.held)
    governor.watch.sample()
    assert governor.watch.broken
    governor.close()


def test_a_ceiling_below_what_is_held_counts_once_that_has_been_given_back(machine):
    governor = watched(machine, "auto")
    first = governor.watch.budget_nbytes
    machine.load(3000 * MIB)
    machine.take(1000 * MIB)  # and nothing is left
    governor.follow()
    assert governor.watch.budget_nbytes == first, "it is being given back"
    governor.follow(at_once=True)
    assert governor.watch.budget_nbytes < machine.held, "nothing more can be given back"
    governor.sample()
    assert not governor.report()["held"]
    governor.close()


def test_another_budget_is_followed_from_then_on(machine):
    governor = watched(machine, "1000MiB")
    governor.set("600MiB")
    governor.follow()
    assert governor.watch.budget_nbytes == 600 * MIB
    assert governor.weights_nbytes() == 300 * MIB - margin_nbytes(600 * MIB)
    governor.close()


@pytest.mark.parametrize(
    ("budget", "part"), [(None, 0.8), ("auto", 0.8), ("50%", 0.5), ("3GiB", None), (5, None), (" 7 % ", 0.07)]
)
def test_the_part_of_the_headroom_a_budget_asks_for(budget, part):
    assert headroom_part(budget) == (None if part is None else pytest.approx(part))
