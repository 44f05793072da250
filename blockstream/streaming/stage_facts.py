"""What is known of one stage, as a value: whoever learns more returns another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from blockstream.module.faking import Call
from blockstream.module.forked import in_fork
from blockstream.module.kept_rehearsals import Rehearsal
from blockstream.module.order import order_of_parts
from blockstream.module.prepared import Cut, Prepared
from blockstream.module.rehearsal import rehearse, shapes_of
from blockstream.module.shelf import Places
from blockstream.plan.segments import Passes

from .declared import Declared
from .known import Known


@dataclass(frozen=True)
class Facts:
    """One stage as the planner sees it. Orders are indices of parts of the `cut`.

    `finer`: the most bytes of a segment that the cut keeps to where it can; None: blocks are whole.
    `guessed`: the order has not been seen. `measured`: the costs of its segments have been, `completed`: what
    each kind of block holds beside weights has been.
    """

    name: str
    cut: Cut
    passes: Passes
    pace: tuple[float, ...] = ()
    between_s: float = 0.0
    has_own_store: bool = False
    finer: int | None = None
    order: tuple[int, ...] = ()
    guessed: bool = True
    known: Known = field(default_factory=Known)
    rehearsal: Rehearsal | None = None
    shapes: str | None = None
    measured: bool = False
    completed: bool = False

    @classmethod
    def of(cls, stage: Declared) -> Facts:
        """Return what is known of a stage that is declared: nothing has been counted or timed."""
        prepared = stage.prepared
        own_store = stage.around is not None
        facts = cls(stage.name, prepared.cut(), stage.passes, stage.pace, stage.between_s, own_store)
        return facts.ordered(prepared)

    @property
    def resident(self) -> tuple[int, ...]:
        """Return the parts that stay for the whole stage."""
        return tuple(i for i, part in enumerate(self.cut.parts) if part.resident)

    @property
    def streamed(self) -> tuple[int, ...]:
        """Return the parts that are visited."""
        return tuple(i for i, part in enumerate(self.cut.parts) if not part.resident)

    @property
    def full_order(self) -> tuple[int, ...]:
        """Return the order of one pass. What is resident is visited first and last: it is used throughout."""
        return (*self.resident, *self.order, *self.resident)

    @property
    def unvisited_nbytes(self) -> int:
        """Return the bytes of the segments that the order of a pass leaves out."""
        left = set(self.streamed) - set(self.order)
        return sum(self.cut.layouts[self.cut.parts[i].name].nbytes for i in left)

    @property
    def activations_nbytes(self) -> int | None:
        """Return what a forward holds besides weights, None where that is not known."""
        return None if self.rehearsal is None else self.rehearsal.activations_nbytes

    def ordered(self, prepared: Prepared) -> Facts:
        """Return the same with the order that the module declares, or the rehearsed forward shows."""
        calls = None if self.rehearsal is None else self.rehearsal.calls
        found = order_of_parts(prepared.module, self.cut.parts, self.cut.declared, calls)
        return replace(self, order=self.streamed if found is None else tuple(found), guessed=found is None)

    def rehearsed(
        self,
        prepared: Prepared,
        inputs: Call,
        failed: Callable[[Exception], None] = lambda error: None,
        apart: bool = False,
    ) -> Facts:
        """Return the same with what a forward of these inputs, run without data, shows.

        `failed` is told why it cannot run; `apart`: in a process of its own.
        """
        run = in_fork if apart else None
        found = rehearse(prepared.module, inputs, prepared.empty_weight, failed=failed, elsewhere=run)
        return replace(self, rehearsal=found, shapes=shapes_of(inputs)).ordered(prepared)

    @property
    def shelf_nbytes(self) -> int:
        """Return the bytes of the least shelf of its experts, 0 where they are not read one by one."""
        return Places(self.cut.experts).least_nbytes

    def recut(self, prepared: Prepared, finer: int | None, apart: bool = False) -> Facts:
        """Return the same of another cut: no segment above so many bytes, where it can be helped.

        Experts are read one by one if they were, or are to be read `apart` now.
        """
        cut, known = prepared.cut(finer, apart or bool(self.cut.experts)), self.known
        if len(cut.experts) > len(self.cut.experts):  # what was measured of whole blocks is not theirs
            known = replace(known, load_s={}, execute_s={})
        return replace(self, cut=cut, finer=finer, known=known).ordered(prepared)
