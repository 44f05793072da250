"""What a device may hold: the most its allocator reserves, and what the process holds there beside it."""

from __future__ import annotations

from typing import Any

from blockstream.budget.amounts import AUTO_PERCENT, format_nbytes, headroom_part, parse_nbytes
from blockstream.errors import BudgetError, ConfigError

from .protocol import Device

#: Left of a budget for the allocator's rounding.
MARGIN_NBYTES = 32 << 20
#: What kernels and the allocator take beside the tensors that a rehearsal counts.
WORKSPACE_NBYTES = 64 << 20
WORKSPACE_PART = 1.25
#: Activations expected of stages that nothing is known of: at least so much, and this part of the budget.
UNKNOWN_NBYTES = 512 << 20
UNKNOWN_PART = 0.25


class DeviceBudget:
    """One session's budget on a device, in bytes, "80%" of what is free there, or "auto" (the same).

    It is kept by the plan, enforced on the allocator, and judged by its peak.
    """

    def __init__(self, device: Device, budget: int | str | None = None) -> None:
        device.forget_peak()  # what was held before this session is not its own
        now = device.memory()
        self.device = device
        self.nbytes = parse_nbytes(
            f"{AUTO_PERCENT}%" if budget is None else budget, now.free_nbytes, _held(device)
        )
        self.explicit = headroom_part(budget) is None
        self._outside_nbytes = now.outside_nbytes
        #: What is held on the device before any weight: context, libraries, tensors of the user's.
        self.base_nbytes = now.outside_nbytes + now.reserved_nbytes
        self.weights_nbytes = 0
        self._peak_nbytes = self.base_nbytes

    def room(self, activations_nbytes: int | None, most_nbytes: int | None = None) -> int:
        """Return the bytes of weights that fit beside what a forward needs, as far as that is known.

        It is no more than `most_nbytes`, where a user set those.
        """
        room = self.nbytes - self.base_nbytes - MARGIN_NBYTES - self.expected(activations_nbytes)
        return room if most_nbytes is None else min(room, most_nbytes)

    def expected(self, activations_nbytes: int | None) -> int:
        """Return what is kept free of weights for activations."""
        if activations_nbytes is not None:
            return int(WORKSPACE_PART * activations_nbytes) + WORKSPACE_NBYTES
        left = max(0, self.nbytes - self.base_nbytes)
        return min(max(UNKNOWN_NBYTES, int(UNKNOWN_PART * left)), left // 2)

    def refuse(self, least_nbytes: int, activations_nbytes: int | None, largest: tuple[str, int]) -> None:
        """Raise BudgetError, naming the least that would do, when weights of `least_nbytes` do not fit."""
        if least_nbytes <= self.room(activations_nbytes):
            return
        beside = self.base_nbytes + MARGIN_NBYTES + self.expected(activations_nbytes)
        raise BudgetError(
            f"device_budget {format_nbytes(self.nbytes)} on {self.device.name} cannot hold two slots of the "
            f"largest segment ({largest[0]}, {format_nbytes(largest[1])}) beside {format_nbytes(beside)} of "
            f"context and activations; the least is {-(-(least_nbytes + beside) // 2**20)} MiB"
        )

    def enforce(self) -> None:
        """Have the allocator refuse what would break the budget."""
        self.device.limit(max(1, self.nbytes - self._outside_nbytes))

    def sample(self) -> None:
        """Take note of what is held now."""
        now = self.device.memory()
        self._outside_nbytes = max(self._outside_nbytes, now.outside_nbytes)
        self._peak_nbytes = max(self._peak_nbytes, now.peak_nbytes + now.outside_nbytes)

    def forecast(self, weights_nbytes: int, activations_nbytes: int | None) -> dict[str, Any]:
        """Return what `plan` says of the device: what is expected to be held there, by cause."""
        causes = {
            "runtime": self.base_nbytes,
            "weights": weights_nbytes,
            "activations": self.expected(activations_nbytes) + MARGIN_NBYTES,
        }
        return {
            "name": self.device.name,
            "budget": {"nbytes": self.nbytes, "peak_nbytes": sum(causes.values()), "by_cause": causes},
        }

    def report(self) -> dict[str, Any]:
        """Return what report.json says of the device and its budget."""
        now = self.device.memory()
        self.sample()
        activations = self._peak_nbytes - self.base_nbytes - self.weights_nbytes
        return {
            "name": self.device.name,
            "others_nbytes": "not attributable" if now.others_nbytes is None else now.others_nbytes,
            "budget": {
                "nbytes": self.nbytes,
                "peak_nbytes": self._peak_nbytes,
                "held": self._peak_nbytes <= self.nbytes,
                "by_cause": {
                    "runtime": self.base_nbytes,
                    "weights": self.weights_nbytes,
                    "activations": max(0, activations),
                },
            },
        }


def budget_on(
    device: Device | None, budget: int | str | None, arena: int | str | None
) -> DeviceBudget | None:
    """Return the budget on a device, None without one. Raises ConfigError for amounts of none."""
    for key, value in (("device_budget", budget), ("device_arena", arena)):
        if device is None and value is not None:
            raise ConfigError(f"{key} {value!r} without a device; name one, such as cuda")
    return None if device is None else DeviceBudget(device, budget)


def _held(device: Device) -> int:
    now = device.memory()
    return now.outside_nbytes + now.reserved_nbytes
