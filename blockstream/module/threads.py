"""Compute threads: numerics, so they come from the config and never from a timing."""

from __future__ import annotations

import torch


def use_threads(threads: int) -> None:
    """Have torch compute with so many threads from here on."""
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
