"""The least memory a streamed run needs, known before anything is allocated.

A process that has imported torch holds a fifth of a gigabyte before it holds a weight. That floor
is measured in a child process once for each set of versions, and kept in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

from blockstream.budget.amounts import format_nbytes
from blockstream.errors import BudgetError

from . import regular
from .memory import held

#: What a run imports when all of the package's uses are installed. Submodules, since the top
#: modules of transformers and diffusers import theirs only on use.
RUNTIME_MODULES = ("torch", "transformers.modeling_utils", "diffusers.models.modeling_utils")

_MEASURE_S = 120


@dataclass(frozen=True, slots=True)
class Floor:
    """What a process holds once `versions` ("torch 2.6.0", ...) are imported and have computed.

    `measured` is False where it comes from the cache.
    """

    nbytes: int
    versions: tuple[str, ...]
    measured: bool


def cache_folder() -> Path:
    """Return the folder of what can be made again: BLOCKSTREAM_CACHE, else the user's cache."""
    if named := os.environ.get("BLOCKSTREAM_CACHE"):
        return Path(named).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/blockstream"
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "blockstream"
    # The XDG specification has relative paths ignored.
    xdg = Path(os.environ.get("XDG_CACHE_HOME") or "")
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "blockstream"


def runtime_floor(
    modules: Sequence[str] = RUNTIME_MODULES, folder: Path | None = None, fresh: bool = False
) -> Floor:
    """Return what a process that uses `modules` holds before any weight.

    Modules that are not installed are left out. Measured in a child process the first time (some
    seconds), then read from `folder` (the cache folder when None) until a version changes or `fresh`
    is set. A cache that cannot be read or written is done without. Raises BudgetError when the child
    fails.
    """
    wanted = [m for m in modules if util.find_spec(m.partition(".")[0]) is not None]
    versions = (f"python {platform.python_version()}", *map(_version, wanted))
    about = {"modules": wanted, "versions": versions, "machine": platform.platform()}
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    file = (folder or cache_folder()) / f"floor-{key}.json"
    nbytes = None if fresh else cached(file)
    if nbytes is not None:
        return Floor(nbytes, versions, measured=False)
    nbytes = _measure(wanted)
    write_cached(file, {**about, "nbytes": nbytes})
    return Floor(nbytes, versions, measured=True)


def _version(module: str) -> str:
    top = module.partition(".")[0]
    try:
        return f"{top} {metadata.version(top)}"
    except metadata.PackageNotFoundError:
        return f"{top} without a version"


def cached(file: Path) -> int | None:
    """Return the bytes that were kept in a file, None for whatever is no such file."""
    try:
        nbytes = json.loads(regular.read_text(file))["nbytes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return nbytes if type(nbytes) is int and nbytes > 0 else None


def write_cached(file: Path, value: object) -> None:
    """Write JSON so that a reader sees all of it or nothing; a folder that refuses is let be."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=file.parent, prefix=f".{file.name}.", delete=False
        ) as draft:
            try:
                json.dump(value, draft)
                draft.close()
                os.replace(draft.name, file)
            except BaseException:
                os.unlink(draft.name)
                raise
    except OSError:
        return


def _measure(modules: Sequence[str]) -> int:
    """Return what a child process that imports `modules` and computes a little holds."""
    program = "import sys; from blockstream.system.floor import _main; _main(sys.argv[1:])"
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


def _main(modules: Sequence[str]) -> None:
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


@dataclass(frozen=True, slots=True)
class LowerBound:
    """The least budget a plan can be made for, by cause, in bytes.

    `runtime` is the floor of the process, `slots` extents of the largest segment are the least that
    streaming needs, `weights` are those outside every segment, `activations` what compute takes.
    """

    runtime: int
    largest: int
    largest_name: str
    weights: int = 0
    activations: int = 0
    slots: int = 2

    @property
    def beside(self) -> int:
        """Return the bytes that are needed beside the arena."""
        return self.runtime + self.weights + self.activations

    @property
    def nbytes(self) -> int:
        """Return the least budget."""
        return self.beside + self.slots * self.largest

    def check(self, budget_nbytes: int) -> None:
        """Raise BudgetError, naming the least that would do, when the budget is below the bound."""
        if budget_nbytes >= self.nbytes:
            return
        what = ["runtime", "activations"]
        if self.weights:
            what.insert(1, "weights outside the blocks")
        raise BudgetError(
            f"budget {_amount(budget_nbytes, self.nbytes)} cannot hold {self.slots} slots of the "
            f"largest segment ({self.largest_name}, {format_nbytes(self.largest)}) beside "
            f"{format_nbytes(self.beside)} of {', '.join(what[:-1])} and {what[-1]}; "
            f"the least is {format_nbytes(self.nbytes, up=True)}"
        )


def _amount(nbytes: int, other: int) -> str:
    """Return an amount, in bytes where it would read the same as the `other` it is told from."""
    text = format_nbytes(nbytes)
    return f"{nbytes} bytes" if text == format_nbytes(other) else text


def lower_bound(
    runtime: int,
    segments: Sequence[tuple[str, int]],
    weights: int = 0,
    activations: int = 0,
    slots: int = 2,
) -> LowerBound:
    """Return the least budget for streaming `segments` ((name, nbytes) each).

    No more slots are needed than there are segments. Raises ValueError without segments.
    """
    if not segments:
        raise ValueError("no segments: there is nothing to stream and no bound to state")
    name, largest = max(segments, key=lambda segment: segment[1])
    return LowerBound(runtime, largest, name, weights, activations, max(1, min(slots, len(segments))))
