"""Merges watched from outside, and what a ledger's notes tell of samplings."""

from __future__ import annotations

import torch

from blockstream.engine.ledger import Ledger, Note
from blockstream.plugins import AttentionLayer, Merge
from blockstream.report.sampling import WatchedMerge, samplings


def test_merging_is_noted_when_it_begins_and_ends():
    ledger, step = Ledger(), {"now": 0}
    watch = WatchedMerge(ledger)
    merge = Merge(lambda x: x, lambda x: x, torch.zeros(1), active=lambda: step["now"] < 2)
    names = ("a", "b", "c")
    layers = [watch.watch(AttentionLayer(n, "temporal", (4, 1, 3), 8, 2), merge) for n in names]
    for step["now"] in range(4):
        assert [layer.active() for layer in layers] == [step["now"] < 2] * 3
    assert [n.value for n in ledger.notes] == [True, False]
    assert watch.layers == set(names)


def test_notes_of_other_kinds_are_passed_over():
    assert samplings([Note("plan", 0.0, {}), Note("memory", 0.0, [1, 2])]) == []
