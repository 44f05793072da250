"""Presets: the configs that the page starts from, and a config from what a page sends."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blockstream.errors import ConfigError, PluginError
from blockstream.plugins import Plugins
from blockstream.plugins.entrypoints import examples
from blockstream.run.config import RunConfig, make_config, read_config
from blockstream.run.json_schema import config_schema, offered_by
from blockstream.run.yamlfile import Document

from .fields import MOST_PROMPTS, ONE_OF, SEVERAL_OF, Field, accepted, fields_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preset:
    """A config by the name that the page shows, and what of it the page may set."""

    name: str
    document: Document
    fields: Sequence[Field]
    values: Mapping[str, Any]
    prompts: Sequence[str]
    takes_prompts: bool
    takes_reference: bool

    def public(self) -> dict[str, Any]:
        """Return what a page is told of it: no value that could be a path."""
        return {
            "name": self.name,
            "fields": self.fields,
            "values": self.values,
            "prompts": list(self.prompts),
            "takes_prompts": self.takes_prompts,
            "takes_reference": self.takes_reference,
        }

    def config(self, asked: Mapping[str, Any], reference: Path | None = None) -> RunConfig:
        """Return the config of what a page asks for: `prompts`, `settings`; an uploaded image if it has one.

        Raises ConfigError for what is wrong with it.
        """
        settings, prompts = asked.get("settings", {}), asked.get("prompts", [])
        if not isinstance(settings, Mapping) or not isinstance(prompts, list):
            raise ConfigError("a request has settings, a mapping, and prompts, a list of texts")
        data = {**self.document.data, **accepted(self.fields, settings)}
        if prompts:
            if not self.takes_prompts:
                raise ConfigError(f"{self.name} takes no prompts")
            if len(prompts) > MOST_PROMPTS or not all(isinstance(p, str) and p.strip() for p in prompts):
                raise ConfigError(f"write 1 to {MOST_PROMPTS} prompts, one a line")
            one = len(prompts) == 1
            data |= {"prompt": prompts[0] if one else None, "prompts": None if one else list(prompts)}
        if reference is not None:
            if not self.takes_reference:
                raise ConfigError(f"{self.name} takes no reference image")
            data["reference"] = str(reference)
        return make_config(replace(self.document, name=self.name, data={**data, "output": None}, marks={}))


def load_presets(names: Iterable[str]) -> dict[str, Preset]:
    """Return the presets of configs by name; without any, those of all packaged examples.

    A config that was named and is wrong raises ConfigError; a packaged one is passed over with a warning.
    """
    named = list(names)
    found: dict[str, Preset] = {}
    for name in named or sorted(examples(), key=lambda n: (n != "movd.yaml", n)):
        try:
            preset = _preset(name)
        except (ConfigError, PluginError) as error:
            if named:
                raise
            log.warning("%s is left out: %s", name, error)
            continue
        if preset.name in found:
            raise ConfigError(f"two configs are called {preset.name}: the page could not tell them apart")
        found[preset.name] = preset
    if not found:
        raise ConfigError("no config can be shown; name one: blockstream web CONFIG")
    return found


def _preset(name: str) -> Preset:
    document = read_config(name)
    plugins = Plugins()
    config = make_config(document, plugins)
    resolved = config.resolved()
    offered = offered_by(plugins, _loadable(plugins))
    offered["pipeline"] = {config.pipeline.ref: config.pipeline.choice}
    schema = config_schema(offered)
    fields = [_with_own(field, resolved) for field in fields_of(schema)]
    keys = schema["properties"]
    prompt, prompts = resolved.get("prompt"), resolved.get("prompts")
    return Preset(
        name=Path(document.name).name,
        document=document,
        fields=[field for field in fields if field is not None],
        values={field["key"]: resolved.get(field["key"]) for field in fields if field is not None},
        prompts=[str(p) for p in (prompts or ([] if prompt is None else [prompt]))],
        takes_prompts="prompt" in keys and "prompts" in keys,
        takes_reference="reference" in keys,
    )


def _loadable(plugins: Plugins) -> list[str]:
    """Return the plugins that can be asked what they offer, those of the config first."""
    found = []
    for name in dict.fromkeys(("builtin", *plugins.loaded, *plugins.visible)):
        try:
            plugins.load(name)
        except (ConfigError, PluginError) as error:
            log.warning("%s; it is passed over", error)
        else:
            found.append(name)
    return found


def _with_own(field: Field, resolved: Mapping[str, Any]) -> Field | None:
    """Return a field of plugins if it offers what the config itself chooses; else it stays as it is there."""
    key = field["key"]
    if key not in (*ONE_OF, *SEVERAL_OF):
        return field
    try:
        accepted([field], {key: resolved[key]})
    except ConfigError:
        return None
    return field
