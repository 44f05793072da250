"""A run that a family is opened for without one."""

from types import SimpleNamespace

from blockstream.checkpoint import Checkpoint


class Planned:
    """A run that is only opened, or, `planning`, only planned."""

    config = SimpleNamespace(attention=())
    checkpoint = staticmethod(Checkpoint.open)

    def __init__(self, planning: bool = True) -> None:
        self.planning = planning
