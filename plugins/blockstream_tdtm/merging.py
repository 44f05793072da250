"""The arithmetic of merging: pure functions of [B, T, ...] tokens, frames along axis 1.

    y = unmerge(attend(merge(x)), T)

Every function is made of views, one mean and one concatenation, on shapes known beforehand, so all trace.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def merge(x: Tensor, factor: int = 2) -> Tensor:
    """Return the means of each `factor` consecutive frames; frames left over at the end pass as they are.

    x [B, T, ...] becomes [B, T // factor + T % factor, ...].
    """
    _check(factor)
    whole = x.shape[1] // factor * factor
    if whole == 0:
        return x
    means = _means(x[:, :whole], factor)
    return means if whole == x.shape[1] else _joined(means, x[:, whole:])


def unmerge(y: Tensor, T: int, factor: int = 2) -> Tensor:
    """Return T frames from `merge`'s: each mean repeated for its frames, the left-over ones as they are.

    Raises ValueError if y [B, T', ...] is not as long as T merged frames are.
    """
    _check(factor)
    groups, left = divmod(T, factor)
    if y.shape[1] != groups + left:
        raise ValueError(
            f"{y.shape[1]} merged frames cannot become {T}: those merge to {groups + left} by {factor}"
        )
    if groups == 0:
        return y
    repeated = _repeated(y[:, :groups], factor)
    return _joined(repeated, y[:, groups:]) if left else repeated


def positions(T: int, factor: int = 2) -> list[float]:
    """Return the place in time of each merged frame: the mean of its frames' indices."""
    groups = T // factor
    means = [group * factor + (factor - 1) / 2 for group in range(groups)]
    return means + [float(t) for t in range(groups * factor, T)]


def merge_reference(x: Tensor, factor: int = 2) -> Tensor:
    """Return the means as the authors' code takes them: frames left over at the end are dropped."""
    _check(factor)
    whole = x.shape[1] // factor * factor
    if whole == 0:
        raise ValueError(f"{x.shape[1]} frames leave nothing when merged by {factor}")
    return _means(x[:, :whole], factor)


def unmerge_reference(y: Tensor, T: int, factor: int = 2) -> Tensor:
    """Return T frames as the authors' code does: dropped ones are copies of the last mean.

    Their code infers T from y and runs where T % 4 is 0 or 3 (not 31), and for 30; this agrees there and
    does the same at any other length.
    """
    _check(factor)
    groups, left = divmod(T, factor)
    if y.shape[1] != groups:
        raise ValueError(f"{y.shape[1]} merged frames cannot become {T}: those merge to {groups} by {factor}")
    repeated = _repeated(y, factor)
    if not left:
        return repeated
    return _joined(repeated, y[:, -1:].expand(-1, left, *[-1] * (y.dim() - 2)))


def _check(factor: int) -> None:
    if factor < 2:
        raise ValueError(f"factor = {factor}: merging takes at least 2 frames")


def _means(x: Tensor, factor: int) -> Tensor:
    B, T, *rest = x.shape
    return x.reshape(B, T // factor, factor, *rest).mean(2)


def _repeated(y: Tensor, factor: int) -> Tensor:
    return y.unsqueeze(2).expand(-1, -1, factor, *[-1] * (y.dim() - 2)).flatten(1, 2)


def _joined(first: Tensor, last: Tensor) -> Tensor:
    import torch

    return torch.cat((first, last), 1)
