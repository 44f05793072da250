"""What the tests of interleavings share: small plans, loads that fail, and knowing when compute waits."""

from __future__ import annotations

import threading
from contextlib import contextmanager

from blockstream.plan.planner import make_plan
from blockstream.plan.retention import NONE
from tests.support.fakes import UNIT, schedule, stage

WAIT = 5


def planned(*stages, units=2, policy=NONE, **options):
    return make_plan(schedule(*(stages or [stage()])), units * UNIT, [policy], **options)


def failing(name, error):
    def before(segment):
        if segment == name:
            raise error

    return before


def run_pass(engine, name="s", count=4):
    for i in range(count):
        with engine.visit(name, f"{name}.{i}"):
            pass


class Waits:
    """Sets `begun` when compute begins to wait for a load: no test needs to sleep until it does."""

    def __init__(self, engine):
        self.begun = threading.Event()
        wait = engine._condition.wait

        def told(timeout=None):
            if threading.current_thread() is not engine._loader._thread:
                self.begun.set()
            return wait(timeout)

        engine._condition.wait = told


@contextmanager
def meanwhile(act):
    """Run `act` in another thread for the length of the block."""
    failed = []

    def run():
        try:
            act()
        except BaseException as error:
            failed.append(error)

    other = threading.Thread(target=run)
    other.start()
    try:
        yield
    finally:
        other.join(timeout=10)
    assert not other.is_alive() and not failed, failed
