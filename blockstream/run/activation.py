"""The plugins of one run, its attention transforms and observers among them."""

from __future__ import annotations

import reprlib

from blockstream.errors import PluginError
from blockstream.plugins.choices import Chosen
from blockstream.plugins.manager import KNOWN_HOOKS, Plugins

from .config import RunConfig

#: The hooks of an attention transform, and those of an observer.
TRANSFORMS = ("token_merge", "attention_kernel")
OBSERVED = tuple(name for name in KNOWN_HOOKS if name.startswith(("run_", "stage_", "pass_", "segment_")))


def activate(config: RunConfig, plugins: Plugins | None = None) -> Plugins:
    """Return the plugins of a run: those its config names, its attention transforms and observers, built.

    `plugins` are the ones the config was made with, where those are more than what is installed.
    """
    plugins = plugins or Plugins()
    for name in [*config.plugins, *(chosen.plugin for chosen in config.chosen())]:
        plugins.load(name)
        _refuse_acting(plugins, name, f"plugin {name!r}: its module has")
    # pluggy asks the latest registered first, a config's list the first.
    for number, chosen in reversed(list(enumerate(config.attention))):
        _register(plugins, chosen, f"{chosen.plugin}:{chosen.choice.name}#{number}", TRANSFORMS)
    for number, chosen in reversed(list(enumerate(config.observers))):
        _register(plugins, chosen, f"{chosen.plugin}:{chosen.choice.name}@{number}", OBSERVED)
    return plugins


def _register(plugins: Plugins, chosen: Chosen, name: str, hooks: tuple[str, ...]) -> None:
    """Register what a choice builds under a name. Raises PluginError where it has none of the hooks."""
    built = chosen.build()
    plugins.register(built, name)
    found = plugins.hooks_of(name)
    if not set(hooks) & set(found):
        raise PluginError(
            f"{chosen.who}: build() returned {reprlib.repr(built)}, which has no hookimpl "
            f"{' or '.join(hooks) if len(hooks) == 2 else f'of an observer ({hooks[0]}, ...)'}: mark its "
            "methods with hookimpl"
        )
    if hooks is OBSERVED:
        _refuse_acting(plugins, name, f"{chosen.who}: build() returned {reprlib.repr(built)} with")


def _refuse_acting(plugins: Plugins, name: str, who: str) -> None:
    """Refuse an observer that would change results, as no config and no record of a run would name it."""
    if acting := [hook for hook in TRANSFORMS if hook in plugins.hooks_of(name)]:
        raise PluginError(
            f"{who} a hookimpl {acting[0]}: an observer changes nothing; offer it by attention_transforms, "
            "and name it under attention:"
        )
