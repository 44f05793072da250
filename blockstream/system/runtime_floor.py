"""What a process holds before it holds a weight.

A process that has imported torch holds a fifth of a gigabyte before it holds a weight. That floor
is measured in a child process once for each set of versions, and kept in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

from blockstream.budget.amounts import format_nbytes
from blockstream.errors import BudgetError

from .cache import cache_folder, cached, write_cached
from .limits import headroom
from .memory import held

#: What a run imports when all of the package's uses are installed. Submodules, since the top
#: modules of transformers and diffusers import theirs only on use.
RUNTIME_MODULES = ("torch", "transformers.modeling_utils", "diffusers.models.modeling_utils")

_MEASURE_S = 120
#: What a run's libraries take where that was never measured, and what planning and the kernel take beside.
FLOOR_NBYTES = 310 << 20
GUARD_NBYTES = 104 << 20


@dataclass(frozen=True, slots=True)
class Floor:
    """What a process holds once `versions` ("torch 2.6.0", ...) are imported and have computed.

    `measured` is False where it comes from the cache.
    """

    nbytes: int
    versions: tuple[str, ...]
    measured: bool


def runtime_floor(
    modules: Sequence[str] = RUNTIME_MODULES, folder: Path | None = None, fresh: bool = False
) -> Floor:
    """Return what a process that uses `modules` holds before any weight.

    Modules that are not installed are left out. Measured in a child process the first time (some
    seconds), then read from `folder` (the cache folder when None) until a version changes or `fresh`
    is set. A cache that cannot be read or written is done without. Raises BudgetError when the child
    fails.
    """
    wanted, about, file = _kept(modules, folder)
    versions: tuple[str, ...] = about["versions"]
    nbytes = None if fresh else cached(file)
    if nbytes is not None:
        return Floor(nbytes, versions, measured=False)
    nbytes = _measure(wanted)
    write_cached(file, {**about, "nbytes": nbytes})
    return Floor(nbytes, versions, measured=True)


def refuse_too_little(swapping: bool = False) -> None:
    """Raise BudgetError, before it is too late, where there is less memory than a run's libraries take.

    What they take is known from an earlier measurement, else `FLOOR_NBYTES`. With `swapping`, what may be
    swapped out counts as there.
    """
    floor = cached(_kept(RUNTIME_MODULES, None)[2]) or FLOOR_NBYTES
    now = headroom()
    there = held().nbytes + now.nbytes + (now.swap_nbytes if swapping else 0)
    if there < floor + GUARD_NBYTES:
        raise BudgetError(
            f"{now.source} leaves this process {format_nbytes(there)}, and torch and the libraries of models "
            f"take {format_nbytes(floor)} before any weight; raise that limit by at least "
            f"{format_nbytes(floor + GUARD_NBYTES - there, up=True)}"
        )


def _kept(modules: Sequence[str], folder: Path | None) -> tuple[list[str], dict[str, Any], Path]:
    """Return the modules that are installed, what their floor depends on, and where it is kept."""
    wanted = [m for m in modules if util.find_spec(m.partition(".")[0]) is not None]
    versions = (f"python {platform.python_version()}", *map(version_of, wanted))
    about = {"modules": wanted, "versions": versions, "machine": platform.platform()}
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    return wanted, about, (folder or cache_folder()) / f"floor-{key}.json"


def version_of(module: str) -> str:
    """Return the name and version of a module's package."""
    top = module.partition(".")[0]
    try:
        return f"{top} {metadata.version(top)}"
    except metadata.PackageNotFoundError:
        return f"{top} without a version"


def _measure(modules: Sequence[str]) -> int:
    """Return what a child process that imports `modules` and computes a little holds."""
    program = "import sys; from blockstream.system.runtime_floor import print_held; print_held(sys.argv[1:])"
    # -P: a torch.py in the working folder is not the torch a run imports.
    command = [sys.executable, "-P", "-c", program, *modules]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_MEASURE_S, check=True)
        return int(done.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, OSError, ValueError, IndexError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
        raise BudgetError(
            f"the memory of a process with {', '.join(modules) or 'no modules'} could not be "
            f"measured ({''.join(said)}); import them in a fresh {sys.executable} to see why"
        ) from error


def print_held(modules: Sequence[str]) -> None:
    """Import `modules`, compute once on every thread and print what is held."""
    for name in modules:
        importlib.import_module(name)
    torch = sys.modules.get("torch")
    if torch is not None:
        # The first products of each kind start the threads and allocate the libraries' workspaces.
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.ones(512, 512, dtype=dtype)
            torch.nn.functional.gelu(x @ x)
            torch.nn.functional.conv3d(torch.ones(1, 4, 4, 16, 16), torch.ones(4, 4, 3, 3, 3))
            del x
    print(held().nbytes)
