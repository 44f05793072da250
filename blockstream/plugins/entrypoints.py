"""What is installed, read from package metadata alone; `load` imports one of them, with blame.

    blockstream            plugins: name -> module
    blockstream.commands   commands: dotted name -> object with configure(parser) and run(args)
    blockstream.examples   configs: file name -> the package whose folder holds it; package:path where the
                           file has another name, as far as what builds the package lets that be written

`BLOCKSTREAM_DISABLE=name,name` hides plugins and whatever else their packages register.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from blockstream.errors import PluginError

log = logging.getLogger(__name__)

PLUGINS = "blockstream"
COMMANDS = "blockstream.commands"
EXAMPLES = "blockstream.examples"

#: The distribution of the engine itself: its names stay its own.
DISTRIBUTION = "blockstream-engine"

#: An import that takes longer is reported, in seconds.
SLOW_IMPORT_S = 2.0


@dataclass(frozen=True)
class Installed:
    """One entry point: its name, its target, the distribution that registers it, whether hidden."""

    name: str
    value: str
    distribution: str = "unknown"
    version: str = ""
    hidden: bool = False

    @property
    def package(self) -> str:
        """Return the top-level package of the target."""
        return self.value.partition(":")[0].partition(".")[0].strip()

    @property
    def provider(self) -> str:
        """Return the distribution and its version."""
        return f"{self.distribution} {self.version}".strip()


def disabled() -> frozenset[str]:
    """Return the names `BLOCKSTREAM_DISABLE` hides."""
    listed = os.environ.get("BLOCKSTREAM_DISABLE", "").split(",")
    return frozenset(name.strip() for name in listed if name.strip())


def plugins() -> tuple[Installed, ...]:
    """Return the installed plugins by name, hidden ones included and marked."""
    hide = disabled()
    found = [_marked(p, p.name in hide or p.package in hide) for p in _read(PLUGINS)]
    if not any(p.name == "builtin" for p in found):
        # A copy on the path that is not installed has no metadata, and its built-ins all the same.
        found.append(Installed("builtin", "blockstream.plugins.builtin", DISTRIBUTION))
    return tuple(sorted(found, key=lambda p: (p.name, p.distribution)))


def commands() -> tuple[Installed, ...]:
    """Return the commands that packages add, by dotted name, hidden ones left out."""
    hidden = {p.package for p in plugins() if p.hidden} | disabled()
    found = [c for c in _read(COMMANDS) if not {c.name, c.package} & hidden]
    return tuple(sorted(found, key=lambda c: (c.name, c.distribution)))


def examples() -> dict[str, Installed]:
    """Return the packaged configs by the name that `run` takes.

    Each by its full name, `package:file`, the distribution's; and by the file's alone where that says which:
    one package has it, or this one does, whose names no other takes over.
    """
    found: dict[str, list[Installed]] = {}
    for example in _read(EXAMPLES):
        found.setdefault(example.name, []).append(example)
    named = {f"{e.distribution}:{e.name}": e for same in found.values() for e in same if len(same) > 1}
    for name, same in found.items():
        own = [e for e in same if e.distribution == DISTRIBUTION]
        if len(same) == 1 or own:
            named[name] = (own or same)[0]
    return named


def example_file(example: Installed) -> Traversable:
    """Return the file of a packaged config. Raises ModuleNotFoundError when its package is gone."""
    package, _, path = example.value.partition(":")
    return files(package.strip()).joinpath(path.strip() or example.name)


def load(entry: Installed, what: str, clock: Callable[[], float] = time.perf_counter) -> Any:
    """Import an entry point and return what it names. `what` is "plugin" or "command".

    Raises PluginError, naming the entry point, its target and its distribution, whatever the import
    raised. An import slower than `SLOW_IMPORT_S` is logged as a warning.
    """
    start = clock()
    try:
        loaded = EntryPoint(entry.name, entry.value, PLUGINS).load()
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        raise PluginError(
            f"{what} {entry.name!r} ({entry.value}, from {entry.provider}) cannot be imported: "
            f"{type(error).__name__}: {error}"
        ) from error
    took = clock() - start
    if took > SLOW_IMPORT_S:
        log.warning(
            "%s %r (%s) took %.1f s to import; heavy imports belong where they are used",
            *(what, entry.name, entry.value, took),
        )
    return loaded


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the closest of the known names, else nothing."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def _read(group: str) -> list[Installed]:
    found = []
    packages: dict[int, tuple[str, str]] = {}  # reading a name or version parses the whole metadata
    for entry in entry_points(group=group):
        dist = entry.dist
        if id(dist) not in packages:
            packages[id(dist)] = (dist.name, dist.version) if dist is not None else ("unknown", "")
        found.append(Installed(entry.name, entry.value, *packages[id(dist)]))
    return found


def _marked(entry: Installed, hidden: bool) -> Installed:
    return Installed(entry.name, entry.value, entry.distribution, entry.version, hidden)
