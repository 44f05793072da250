"""The plugins of one run: imported when named, asked by kind, blamed by name and hook.

    plugins = Plugins()
    plugin, choice = plugins.find("sampler", "lpl")  # imports what the entry point names, only that
    plugins.hook.stage_started(stage=stage)          # every plugin loaded so far

Each run has a manager of its own, so nothing a run registers outlives it.
"""

from __future__ import annotations

import inspect
import logging
import os
import reprlib
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pluggy

from blockstream.checkpoint.formats import Format
from blockstream.errors import ConfigError, PluginError

from . import entrypoints, hookspecs
from .blame import blamed, blaming
from .choices import KINDS, Choice, ModelFamily
from .entrypoints import nearest
from .transforms import Merge

log = logging.getLogger(__name__)


class Plugins:
    """A pluggy manager that loads entry points by name and blames their failures on them."""

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager("blockstream")
        self._manager.add_hookspecs(hookspecs)
        self.hook = self._manager.hook
        self.installed = entrypoints.plugins()
        self._offers: dict[tuple[str, str], dict[str, Any]] = {}
        if os.environ.get("BLOCKSTREAM_TRACE_PLUGINS", "") not in ("", "0"):
            self._manager.add_hookcall_monitoring(_trace_call, _trace_result)

    @property
    def loaded(self) -> tuple[str, ...]:
        """Return the names of the plugins loaded or registered so far, in that order."""
        return tuple(name for name, _ in self._manager.list_name_plugin())

    @property
    def visible(self) -> tuple[str, ...]:
        """Return the names of the installed plugins that are not hidden."""
        return tuple(dict.fromkeys(p.name for p in self.installed if not p.hidden))

    def load(self, name: str) -> None:
        """Import the plugin of that entry-point name and register it; nothing if it is already.

        Raises ConfigError when no such plugin is installed or it is hidden, PluginError when it
        cannot be imported or implements a hook wrongly.
        """
        if self._manager.has_plugin(name):
            return
        found = self._installed(name)
        if not found:
            raise ConfigError(
                f"no plugin {name!r} is installed{nearest(name, self.visible)} "
                f"(installed: {_names(self.visible)})"
            )
        if found[0].hidden:
            raise ConfigError(f"plugin {name!r} is hidden by BLOCKSTREAM_DISABLE")
        if len(found) > 1:
            raise PluginError(
                f"plugin {name!r} is registered by {_names([p.provider for p in found])}; uninstall all but "
                f"one, or write {' or '.join(f'{p.distribution}/{name}' for p in found)}"
            )
        self.register(entrypoints.load(found[0], "plugin"), name)

    def _installed(self, name: str) -> list[entrypoints.Installed]:
        """Return the plugins of a name, or of a full one, `distribution/name`.

        A name of the engine's own distribution is its own, whoever else registers it, which is said once.
        """
        distribution, _, bare = name.rpartition("/")
        found = [p for p in self.installed if p.name == bare and distribution in ("", p.distribution)]
        own = [p for p in found if p.distribution == entrypoints.DISTRIBUTION]
        if len(found) > 1 and len(own) == 1:
            for other in (p for p in found if p not in own):
                log.warning(
                    "plugin %r of %s is passed over: the name is the engine's own; %s/%s is the other",
                    *(bare, other.provider, other.distribution, bare),
                )
            return own
        return found

    def register(self, plugin: object, name: str) -> None:
        """Register an object with hookimpls under a name that its failures are reported by."""
        try:
            self._manager.register(plugin, name)
        except ValueError as error:
            raise PluginError(f"plugin {name!r}: {error}") from error
        except pluggy.PluginValidationError as error:
            self._manager.unregister(name=name)
            raise PluginError(f"plugin {name!r}: {error}") from error
        for caller in self._manager.get_hookcallers(plugin) or ():
            for implementation in caller.get_hookimpls():
                if implementation.plugin is not plugin:
                    continue
                if not caller.has_spec() and not implementation.optionalhook:
                    self._manager.unregister(name=name)
                    hint = nearest(caller.name, KNOWN_HOOKS)
                    raise PluginError(f"plugin {name!r} implements no hook {caller.name!r}{hint}")
                _guard(name, caller.name, implementation)

    def offers(self, key: str, plugin: str) -> dict[str, Choice]:
        """Return what a loaded plugin offers of one kind ("sampler", "policy", ...), by name."""
        return self._ask(KINDS[key].hook, plugin)

    def find(self, key: str, ref: str) -> tuple[str, Choice]:
        """Return (plugin, choice) for a name as YAML has it, loading the plugin it names.

        `plugin:item` names both. A bare name is a built-in item, else a plugin's item of that name
        or its only one, else an item of a plugin already loaded. Raises ConfigError otherwise.
        """
        plugin, colon, item = ref.partition(":")
        if colon:
            self.load(plugin)
            offered = self.offers(key, plugin)
            if item not in offered:
                raise ConfigError(
                    f"plugin {plugin!r} offers no {key} {item!r}{nearest(item, offered)} "
                    f"(it offers: {_names(offered)})"
                )
            return plugin, offered[item]
        if "builtin" in self.visible:
            self.load("builtin")
            if ref in (offered := self.offers(key, "builtin")):
                return "builtin", offered[ref]
        if any(ref in (p.name, f"{p.distribution}/{p.name}") for p in self.installed):
            return ref, self._own_choice(key, ref)
        holders = [name for name in self.loaded if ref in self.offers(key, name)]
        if len(holders) == 1:
            return holders[0], self.offers(key, holders[0])[ref]
        if holders:
            raise ConfigError(
                f"{key} {ref!r} is offered by several plugins; "
                f"write {' or '.join(f'{name}:{ref}' for name in holders)}"
            )
        built_in = self.offers(key, "builtin") if "builtin" in self.loaded else {}
        others = [name for name in self.visible if name != "builtin"]
        raise ConfigError(
            f"no {key} {ref!r}{nearest(ref, [*built_in, *others])} "
            f"(built in: {_names(built_in)}; installed plugins: {_names(others)})"
        )

    def family(self, ref: str) -> ModelFamily:
        """Return the model family of that name; `plugin:name` loads that plugin alone.

        A bare name that no loaded plugin knows is looked for in every visible plugin until one has
        it: the caller asked for it, and metadata does not list families.
        """
        plugin, colon, name = ref.rpartition(":")
        if colon:
            self.load(plugin)
        known: dict[str, ModelFamily] = {}
        for found in [self.families(plugin)] if colon else self.all_families():
            if name in found:
                return found[name]
            known |= found
        tried = [plugin] if colon else list(dict.fromkeys([*self.loaded, *self.visible]))
        raise ConfigError(
            f"no model family {name!r}{nearest(name, known)} (in {_names(tried)}: {_names(known)})"
        )

    def all_families(self) -> Iterator[dict[str, ModelFamily]]:
        """Yield the model families of every visible plugin, by name.

        Nobody has named the plugins: one that cannot be loaded, or fails, is passed over with a warning.
        """
        for plugin in dict.fromkeys([*self.loaded, *self.visible]):
            try:
                if plugin not in self.loaded:
                    self.load(plugin)
                found = self.families(plugin)
            except PluginError as error:
                log.warning("%s; it is passed over", error)
                continue
            yield found

    def weight_formats(self) -> tuple[Format, ...]:
        """Return the formats of weights that every visible plugin adds to the table.

        Nobody has named the plugins: one that cannot be loaded, or fails, is passed over with a warning.
        """
        found: list[Format] = []
        for plugin in dict.fromkeys([*self.loaded, *self.visible]):
            try:
                if plugin not in self.loaded:
                    self.load(plugin)
                found += (_blamed_format(f, plugin) for f in self._ask("weight_formats", plugin).values())
            except PluginError as error:
                log.warning("%s; it is passed over", error)
        return tuple(found)

    def families(self, plugin: str) -> dict[str, ModelFamily]:
        """Return the model families of a loaded plugin, by name."""
        return self._ask("model_families", plugin)

    def hooks_of(self, plugin: str) -> tuple[str, ...]:
        """Return the names of the hooks a loaded plugin implements."""
        callers = self._manager.get_hookcallers(self._manager.get_plugin(plugin)) or ()
        return tuple(sorted(caller.name for caller in callers))

    def said(self) -> dict[str, Any]:
        """Return what the transforms of a run have to say of it, by name: what their `report()` returns."""
        found = {}
        for name, plugin in self._manager.list_name_plugin():
            report = getattr(plugin, "report", None)
            if "#" in name and callable(report) and not name.startswith("observer#"):
                found[name.partition("#")[0]] = blamed(f"plugin {name!r}, report()", report)()
        return found

    def _own_choice(self, key: str, plugin: str) -> Choice:
        """Return the choice a plugin's bare name stands for: its namesake, or the only one."""
        self.load(plugin)
        offered = self.offers(key, plugin)
        if (bare := plugin.rpartition("/")[2]) in offered:
            return offered[bare]
        if len(offered) == 1:
            return next(iter(offered.values()))
        if not offered:
            raise ConfigError(f"plugin {plugin!r} offers no {key}")
        raise ConfigError(
            f"plugin {plugin!r} offers several of {key}; "
            f"write one of {_names(f'{plugin}:{item}' for item in offered)}"
        )

    def _ask(self, hook: str, plugin: str) -> dict[str, Any]:
        """Return what one plugin's listing hook returns, by name; each is asked once."""
        if (hook, plugin) not in self._offers:
            others = [p for name, p in self._manager.list_name_plugin() if name != plugin]
            listed = self._manager.subset_hook_caller(hook, others)()
            items = [item for part in listed for item in part]
            _refuse_names(plugin, hook, items)
            by_name = {item.name: item for item in items}
            _refuse_other_options(plugin, hook, items)
            if hook == "model_families":
                by_name = {name: _blamed_family(item, plugin) for name, item in by_name.items()}
            if len(by_name) < len(items):
                raise PluginError(
                    f"plugin {plugin!r}, hook {hook}: returned several of one name: "
                    f"{_names(item.name for item in items)}"
                )
            self._offers[hook, plugin] = by_name
        return self._offers[hook, plugin]


def _blamed_format(row: Format, plugin: str) -> Format:
    who = f"plugin {plugin!r}, format {row.name!r}"
    find = None if row.find is None else _listed(f"{who}: find()", row.find)
    layer = row.layer if isinstance(row.layer, str) else blamed(f"{who}: layer()", row.layer)
    return replace(row, find=find, layer=layer)


def _listed(who: str, find: Callable[..., Any]) -> Callable[..., Any]:
    """Return a finder whose weights are all found, or its failure blamed, when it is called."""
    return blamed(who, lambda tensors: list(find(tensors)))


def _refuse_names(plugin: str, hook: str, items: Sequence[Any]) -> None:
    for item in items:
        if not isinstance(item.name, str) or not item.name.strip() or set(item.name) & {":", "/"}:
            raise PluginError(
                f"plugin {plugin!r}, hook {hook}: returned one of the name {item.name!r}; a name is text "
                "without : and /"
            )


def _blamed_family(family: ModelFamily, plugin: str) -> ModelFamily:
    """Return a family whose functions are blamed for what they raise, or return instead of a module."""
    who = f"plugin {plugin!r}, model family {family.name!r}"

    def made(name: str, function: Callable[..., Any], optional: bool) -> Callable[..., Any]:
        asked = blamed(f"{who}: {name}()", function)

        def make(*args: Any) -> Any:
            found = asked(*args)
            if not hasattr(found, "named_parameters") and not (optional and found is None):
                more = " or None" if optional else ""
                raise PluginError(f"{who}: {name}() returned {reprlib.repr(found)}, expected a module{more}")
            return found

        return make

    from_config, write_extras = family.from_config, family.write_extras
    return replace(
        family,
        module=made("module", family.module, optional=False),
        from_config=None if from_config is None else made("from_config", from_config, optional=True),
        write_extras=None if write_extras is None else blamed(f"{who}: write_extras()", write_extras),
    )


def _refuse_other_options(plugin: str, hook: str, items: Sequence[Any]) -> None:
    for item in items:
        options = getattr(item, "options", None)
        if options is not None and not (isinstance(options, type) and hasattr(options, "model_fields")):
            raise PluginError(
                f"plugin {plugin!r}, hook {hook}: the options of {item.name!r} are {reprlib.repr(options)}; "
                "they have to be a pydantic model, or None"
            )


KNOWN_HOOKS = tuple(name for name, value in vars(hookspecs).items() if hasattr(value, "blockstream_spec"))


def _is_list_of(kind: type) -> Callable[[Any], bool]:
    return lambda r: r is None or (isinstance(r, Sequence) and all(isinstance(x, kind) for x in r))


#: What a hook's result has to be, where it matters.
_EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    **{kind.hook: (_is_list_of(Choice), "a list of Choice") for kind in KINDS.values()},
    "model_families": (_is_list_of(ModelFamily), "a list of ModelFamily"),
    "weight_formats": (_is_list_of(Format), "a list of Format"),
    "token_merge": (lambda r: r is None or isinstance(r, Merge), "a Merge or None"),
    "attention_kernel": (lambda r: r is None or callable(r), "a function or None"),
}


def _with_blame(result: Any, who: str) -> Any:
    """Return what a hook returned, its functions blamed where they fail later."""
    if isinstance(result, Merge):
        names = ("merge", "unmerge", "active")
        return replace(result, **{n: blamed(f"{who}: {n}()", getattr(result, n)) for n in names})
    if callable(result):
        call = blamed(f"{who}: its function", result)
        if hasattr(result, "density"):
            call.density = _checked_density(f"{who}: density()", result.density)
        return call
    return result


def _checked_density(who: str, density: Callable[[], Any]) -> Callable[[], float]:
    """Return what tells a kernel's share of the pairs, which is a number from 0 to 1."""
    asked = blamed(who, density)

    def share() -> float:
        found = asked()
        if not isinstance(found, int | float) or not 0 <= found <= 1:
            raise PluginError(f"{who}: returned {reprlib.repr(found)}, expected a share from 0 to 1")
        return float(found)

    return share


def _guard(plugin: str, hook: str, implementation: pluggy.HookImpl) -> None:
    """Turn a hookimpl's failures into PluginErrors; errors of the package pass unchanged."""
    function: Callable[..., Any] = implementation.function
    fits, expected = _EXPECTED.get(hook, (None, ""))
    who = f"plugin {plugin!r}, hook {hook}"
    first = hook in ("token_merge", "attention_kernel")  # of the others a wrapper sees all results at once

    def call(*args: object) -> Any:
        with blaming(who):
            result = function(*args)
        if inspect.iscoroutine(result):
            result.close()
            raise PluginError(f"{who}: is asynchronous; hooks are plain functions")
        if fits is not None and not fits(result):
            raise PluginError(f"{who}: returned {reprlib.repr(result)}, expected {expected}")
        return _with_blame(result, who)

    def wrap(*args: object) -> Generator[Any, Any, Any]:
        with blaming(who):
            result = yield from function(*args)
        if first and fits is not None and not fits(result):
            raise PluginError(f"{who}: returned {reprlib.repr(result)}, expected {expected}")
        return _with_blame(result, who) if first else result

    wrapper = implementation.wrapper or implementation.hookwrapper
    # HookImpl is pluggy's record of an implementation; the multicall reads `function` each time.
    implementation.function = wrap if wrapper else call  # type: ignore[misc]


def _trace_call(hook: str, implementations: Sequence[Any], arguments: Any) -> None:
    shown = ", ".join(f"{name}={reprlib.repr(value)}" for name, value in arguments.items())
    asked = _names(i.plugin_name for i in reversed(implementations))
    print(f"blockstream: {hook}({shown}) asks {asked}", file=sys.stderr)


def _trace_result(outcome: Any, hook: str, implementations: Any, arguments: Any) -> None:
    error = outcome.exception
    shown = f"raised {error!r}" if error is not None else f"= {reprlib.repr(outcome.get_result())}"
    print(f"blockstream: {hook} {shown}", file=sys.stderr)


def _names(names: Any) -> str:
    return ", ".join(names) or "none"
