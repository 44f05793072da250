"""A fake device in the place of the CUDA devices that a config may name."""

from __future__ import annotations

from typing import Any

from blockstream.device import choose
from blockstream.device.fake import FakeDevice


def fake_cuda(monkeypatch: Any, **options: Any) -> FakeDevice:
    """Have `device: cuda` mean one fake device until the test is over; return it."""
    device = FakeDevice(**options)
    monkeypatch.setattr(choose, "devices_here", lambda: 1)
    monkeypatch.setattr(choose, "CudaDevice", lambda index=0: device)
    return device
