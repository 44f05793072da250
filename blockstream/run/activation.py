"""The plugins of one run, its attention transforms among them."""

from __future__ import annotations

import reprlib

from blockstream.errors import PluginError
from blockstream.plugins.manager import Plugins

from .config import RunConfig


def activate(config: RunConfig, plugins: Plugins | None = None) -> Plugins:
    """Return the plugins of a run: those its config names, and its attention transforms, built.

    `plugins` are the ones the config was made with, where those are more than what is installed.
    """
    plugins = plugins or Plugins()
    for name in [*config.plugins, *(chosen.plugin for chosen in config.chosen())]:
        plugins.load(name)
    # pluggy asks the latest registered first, a config's list the first.
    for number, chosen in reversed(list(enumerate(config.attention))):
        name, built = f"{chosen.plugin}:{chosen.choice.name}#{number}", chosen.build()
        plugins.register(built, name)
        if not {"token_merge", "attention_kernel"} & set(plugins.hooks_of(name)):
            raise PluginError(
                f"{chosen.who}: build() returned {reprlib.repr(built)}, which has no hookimpl token_merge or "
                "attention_kernel: mark its methods with hookimpl"
            )
    return plugins
