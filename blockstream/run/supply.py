"""What a config's backend supplies a run with, in the place of files and of the pipeline's own networks."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from blockstream.checkpoint import Checkpoint, FileStamp
from blockstream.errors import ConfigError, PluginError
from blockstream.plugins.blame import blaming
from blockstream.plugins.choices import Chosen
from blockstream.plugins.network import Network
from blockstream.plugins.protocols import Run


class Supply:
    """A backend that a config has chosen, None for none; see `blockstream.plugins.Backend`.

    What it raises, or returns instead of what it should, is a PluginError that names it.
    """

    def __init__(self, chosen: Chosen | None, pipeline: str) -> None:
        self._chosen, self._pipeline = chosen, pipeline
        self._backend: Any = None if chosen is None else chosen.build()
        self._opened: set[FileStamp] = set()

    @cached_property
    def identity(self) -> str | None:
        """Return what the results follow from beside config and weights; None without a backend."""
        if self._chosen is None:
            return None
        found = self._call("identity") if self._has("identity") else ""
        if not isinstance(found, str):
            raise PluginError(f"{self._who('identity')}: returned {found!r}, expected a str")
        return f"{self._chosen.ref} {found}".strip()

    def checkpoint(self, path: str | os.PathLike[str]) -> Checkpoint:
        """Return the checkpoint at a path: the files that are there, or what the backend has for them."""
        if not self._has("checkpoint"):
            return Checkpoint.open(path)
        found = self._call("checkpoint", Path(path))
        if not isinstance(found, Checkpoint):
            raise PluginError(f"{self._who('checkpoint')}: returned {found!r}, expected a Checkpoint")
        self._opened.update(found.files)
        return found

    def network(self, stage: str, network: Network, run: Run) -> Network:
        """Return what a stage is made of, the pipeline's own `network` or another.

        Raises ConfigError for a stage that the backend has no segments for, and for one whose weights would
        be read past it.
        """
        if self._has("network"):
            found = self._call("network", stage, network, run)
            if found is None:
                raise ConfigError(
                    f"backend: {self._ref}: has no segments for stage {stage!r} of pipeline "
                    f"{self._pipeline!r}; leave backend out, or name one that has"
                )
            if not isinstance(found, Network):
                raise PluginError(f"{self._who('network')}: returned {found!r}, expected a Network or None")
            network = found
        assert network.checkpoint is not None
        if not isinstance(network.checkpoint, Checkpoint):
            return network._replace(checkpoint=self.checkpoint(network.checkpoint))
        if self._has("checkpoint") and not (
            run.planning or self._opened.issuperset(network.checkpoint.files)
        ):
            raise ConfigError(
                f"backend: {self._ref}: pipeline {self._pipeline!r} opens the weights of stage {stage!r} "
                f"({network.checkpoint.root}) by itself, and they would not come through it; have it open "
                "them with run.checkpoint(path), or leave backend out"
            )
        return network

    def close(self) -> None:
        """Let the backend close what it holds: connections, files."""
        if self._has("close"):
            self._call("close")

    def _has(self, method: str) -> bool:
        return callable(getattr(self._backend, method, None))

    def _call(self, method: str, *args: Any) -> Any:
        call: Callable[..., Any] = getattr(self._backend, method)
        with blaming(self._who(method)):
            return call(*args)

    def _who(self, method: str) -> str:
        assert self._chosen is not None
        return f"{self._chosen.who}, {method}()"

    @property
    def _ref(self) -> str:
        assert self._chosen is not None
        return self._chosen.ref
