"""What plugins offer by name: choices a YAML file can make, and families of models.

A `Choice` is what a plugin returns; a `Chosen` is one a config has made, its options validated.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockstream.errors import PluginError

from .blame import blamed, blaming

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic_core import CoreSchema
    from torch import nn

    from blockstream.plan.retention import RetentionPolicy
    from blockstream.plan.segments import Stage


@dataclass(frozen=True)
class Choice:
    """One thing a config may name: a pipeline, backend, sampler, transform, retention policy or observer.

    `build(options)` makes it; `options` is its pydantic model (None: it has no options, and
    `build(None)` is called). `summary` is one line for `blockstream plugins --hooks`. What is heavy
    is imported inside `build`.
    """

    name: str
    build: Callable[[Any], Any]
    options: type[BaseModel] | None = None
    summary: str = ""


@dataclass(frozen=True)
class ModelFamily:
    """An architecture by name, for `synth`, `pack` and `plan`.

    `module()` returns the full-size module with its parameters on the meta device; `config` is what its
    config.json holds. `from_config(config)` builds the module of a folder's config.json, None when that is
    another architecture's. `write_extras(folder)` adds what a folder has beside weights: a tokenizer.
    """

    name: str
    module: Callable[[], nn.Module]
    summary: str = ""
    config: Mapping[str, Any] | None = None
    from_config: Callable[[Mapping[str, Any]], nn.Module | None] | None = None
    write_extras: Callable[[Path], None] | None = None


def _as_it_is(built: Any, who: str) -> Any:
    return built


def _blamed_policies(built: Any, who: str) -> Any:
    def one(policy: RetentionPolicy) -> RetentionPolicy:
        adjust = None if policy.adjust is None else _checked(f"{who}: adjust()", policy.adjust)
        return replace(policy, retain=_checked(f"{who}: retain()", policy.retain), adjust=adjust)

    return [one(policy) for policy in built]


def _checked(who: str, chooses: Callable[..., Any]) -> Callable[..., Any]:
    """Return a policy's function, blamed for what it raises and for what is no choice of segments."""
    asked = blamed(who, chooses)

    def choose(stage: Stage, room: int, *there: Any) -> list[int]:
        found = asked(stage, room, *there)
        wrong = reprlib.repr(found)
        if not isinstance(found, Sequence) or isinstance(found, str | bytes):
            raise PluginError(f"{who}: returned {wrong}, expected the indices of segments to keep")
        of = len(stage.segments)
        for i in found:
            if type(i) is not int or not 0 <= i < of:
                raise PluginError(
                    f"{who}: returned {wrong}; {i!r} is no index of the {of} segments, 0 to {of - 1}"
                )
        nbytes = sum(stage.segments[i].nbytes for i in {i for i in found if not stage.segments[i].resident})
        if nbytes > room:
            raise PluginError(f"{who}: returned {wrong}, which take {nbytes:,} bytes of a room of {room:,}")
        return list(found)

    return choose


@dataclass(frozen=True)
class Kind:
    """One kind of choice: its key in the YAML, the hook that lists it, what `build` returns.

    `with_blame(built, who)` returns what was built, its later failures blamed on `who`.
    """

    key: str
    hook: str
    what: str
    fits: Callable[[Any], bool]
    with_blame: Callable[[Any, str], Any] = _as_it_is


def _is_policies(built: Any) -> bool:
    from blockstream.plan.retention import RetentionPolicy

    return (
        isinstance(built, list | tuple) and bool(built) and all(isinstance(p, RetentionPolicy) for p in built)
    )


def _is_scheduler(built: Any) -> bool:
    return callable(getattr(built, "run", None))


def _is_backend(built: Any) -> bool:
    return any(callable(getattr(built, method, None)) for method in ("checkpoint", "network"))


def _is_pipeline(built: Any) -> bool:
    return all(callable(getattr(built, method, None)) for method in ("declare", "run"))


def _is_something(built: Any) -> bool:
    return built is not None


#: The kinds of choice by their key in the YAML; a scheduler is named by `sweep --on` instead.
KINDS: dict[str, Kind] = {
    kind.key: kind
    for kind in (
        Kind("pipeline", "pipelines", "an object with declare(session, run) and run(...)", _is_pipeline),
        Kind(
            "backend",
            "backends",
            "an object with checkpoint(path) or network(stage, network, run)",
            _is_backend,
        ),
        Kind("sampler", "samplers", "a function sample(flow, z, i=0, memory=None)", callable),
        Kind("attention", "attention_transforms", "an object with hookimpls", _is_something),
        Kind("observers", "observers", "an object with hookimpls", _is_something),
        Kind("policy", "retention_policies", "a sequence of RetentionPolicy", _is_policies, _blamed_policies),
        Kind("scheduler", "schedulers", "an object with run(perform, tasks, needs)", _is_scheduler),
    )
}


@dataclass(frozen=True)
class Chosen:
    """A choice a config has made: `ref` is the name as written, `plugin` the one that offers it."""

    key: str
    ref: str
    plugin: str
    choice: Choice
    options: BaseModel | None = None

    def build(self) -> Any:
        """Return what the choice builds from its options.

        Raises PluginError, naming the plugin, when `build` raises or returns something else; errors
        of the package raised on purpose pass unchanged.
        """
        kind = KINDS[self.key]
        who = f"plugin {self.plugin!r}, build() of {kind.key} {self.choice.name!r}"
        with blaming(who):
            built = self.choice.build(self.options)
        if not kind.fits(built):
            raise PluginError(f"{who}: returned {built!r}, expected {kind.what}")
        return kind.with_blame(built, self.who)

    @property
    def who(self) -> str:
        """Return whom to blame when what was built fails."""
        return f"plugin {self.plugin!r}, {self.key} {self.choice.name!r}"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> CoreSchema:
        """Let a pydantic model hold a choice as it is."""
        from pydantic_core import core_schema

        return core_schema.is_instance_schema(cls)

    def written(self) -> str | dict[str, Any]:
        """Return the choice as YAML has it: a name, or a mapping of the name and every option."""
        if self.options is None or not type(self.options).model_fields:
            return self.ref
        return {"name": self.ref, **self.plain_options()}

    def plain_options(self) -> dict[str, Any]:
        """Return the options as JSON and YAML hold them. Raises PluginError where they cannot."""
        if self.options is None:
            return {}
        with blaming(f"{self.who}: its options cannot be written"):
            return self.options.model_dump(mode="json", by_alias=True)
