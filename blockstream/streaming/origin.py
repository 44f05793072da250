"""Where numbers that are not finite come from: a call made again, its modules followed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from blockstream.module.binding import tensors_in
from blockstream.module.guards import Follower
from blockstream.module.prepared import Prepared


class _FoundError(Exception):
    """Ends the call once the first is known."""


def first_not_finite(stages: Mapping[str, Prepared], again: Callable[[], object]) -> str | None:
    """Return which module first returns NaN or infinity when a call is made again; None where none does.

    Negative infinities alone are what masks are made of. Whatever else the call raises is passed over: it is
    made for the name only.
    """
    found: list[str] = []
    followed: list[Follower] = []

    def leave(name: str, output: Any, failed: bool) -> None:
        if not failed and not found and any(map(_is_wrong, (t for _, t in tensors_in(output)))):
            found.append(name)
            raise _FoundError

    try:
        for stage, prepared in stages.items():
            for path, module in prepared.module.named_modules():
                name = f"{path or 'the module itself'} of stage {stage}"
                call = Follower(module, name, lambda args, kwargs: None, partial(leave, name))
                call.attach()
                followed.append(call)
        again()
    except Exception:
        return found[0] if found else None
    finally:
        for call in reversed(followed):
            call.remove()
    return None


def _is_wrong(value: torch.Tensor) -> bool:
    return value.is_floating_point() and bool((value.isnan() | value.isposinf()).any())
