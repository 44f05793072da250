"""Which device a user means, and whether it is here."""

from __future__ import annotations

import torch

from blockstream.errors import ConfigError

from .cuda import CudaDevice, count
from .imagined import ImaginedDevice
from .names import index_of, parse_device
from .protocol import Device


def devices_here() -> int:
    """Return how many CUDA devices torch can use here."""
    return count()


def resolve(device: object, planning: bool = False) -> str:
    """Return what a name comes to here: "auto" is "cuda" where torch has one, else "cpu".

    Nothing is opened. Raises ConfigError for a device that is not here, unless it is `planning` alone, and
    for what there is no tier for.
    """
    try:
        named = parse_device(str(device) if isinstance(device, torch.device) else device)
    except ConfigError as error:
        raise ConfigError(f"device: {error}") from error
    there = devices_here()
    if named == "auto":
        return "cuda" if there else "cpu"
    if named == "cpu" or index_of(named) < there or (planning and not there):
        return named
    if there:
        raise ConfigError(f"device: {named}: torch has {there} here, cuda:0 to cuda:{there - 1}")
    if torch.version.cuda is None:
        next_step = (
            f"this torch ({torch.__version__}) is built without CUDA; install one with (pip install torch)"
        )
    else:
        next_step = "nvidia-smi says whether the driver sees one; mend that"
    raise ConfigError(f"device: {named}: torch finds no CUDA device here: {next_step}, or write cpu, or auto")


def choose_device(device: str | torch.device | Device | None, planning: bool = False) -> Device | None:
    """Return the device that compute is to run on; None for the processor.

    Where it is not here, `planning` has one that is imagined. Raises ConfigError as `resolve` does.
    """
    if device is None:
        return None
    if not isinstance(device, str | torch.device) and hasattr(device, "where"):
        return device
    name = resolve(device, planning)
    if name == "cpu":
        return None
    return CudaDevice(index_of(name)) if devices_here() else ImaginedDevice(name)
