"""The JSON Schema of a config file, with the options of the plugins that are asked for.

Editors complete and check a YAML file against it; the `choices` of each kind come from plugins, the
keys at the top level from the engine and from the pipeline.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from blockstream.plugins.choices import KINDS, Choice
from blockstream.plugins.manager import Plugins
from blockstream.run.config import DEFAULTS, LISTED, Settings

#: The choices of each kind by the name a config writes: {"sampler": {"euler": Choice(...)}}.
Offered = Mapping[str, Mapping[str, Choice]]

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def offered_by(plugins: Plugins, names: Iterable[str]) -> dict[str, dict[str, Choice]]:
    """Return what the plugins of those names offer, loading them, by kind and written name.

    An item is written `plugin:item`, a built-in one by its bare name, and the only item or the
    namesake of a plugin by the plugin's name too.
    """
    offered: dict[str, dict[str, Choice]] = {key: {} for key in KINDS}
    for plugin in dict.fromkeys(names):
        plugins.load(plugin)
        for key, found in offered.items():
            items = plugins.offers(key, plugin)
            for name, choice in items.items():
                if plugin == "builtin":
                    found[name] = choice
                    continue
                if name == plugin or (len(items) == 1 and plugin not in found):
                    found[plugin] = choice
                found[f"{plugin}:{name}"] = choice
    return offered


def config_schema(offered: Offered) -> dict[str, Any]:
    """Return the JSON Schema of configs that make any of these choices.

    With one pipeline its options are at the top level and other keys are refused; with several the
    schema is any of theirs; with none every other key is allowed.
    """
    definitions, own = _definitions(choice.options for found in offered.values() for choice in found.values())
    shapes = [
        _top_level(offered, own, pipeline, names) for pipeline, names in _by_choice(offered["pipeline"])
    ]
    if not shapes:
        shapes = [_top_level(offered, own, None, [])]
    shape = shapes[0] if len(shapes) == 1 else {"anyOf": shapes}
    return {"$schema": DIALECT, "title": "a blockstream run", **shape, "$defs": definitions}


def _top_level(
    offered: Offered, own: Mapping[type[BaseModel], Any], pipeline: Choice | None, names: list[str]
) -> dict[str, Any]:
    options = own[pipeline.options] if pipeline is not None and pipeline.options else {}
    choices = {key: _choice(offered[key], own, DEFAULTS[key]) for key in DEFAULTS}
    choices |= {key: {"type": "array", "items": choices[key], "default": []} for key in LISTED}
    return {
        "type": "object",
        "properties": {
            "pipeline": {"enum": names} if pipeline is not None else {"type": "string"},
            **own[Settings]["properties"],
            **choices,
            **options.get("properties", {}),
        },
        "required": ["pipeline", *options.get("required", [])],
        "additionalProperties": pipeline is None,
    }


def _choice(
    offered: Mapping[str, Choice], own: Mapping[type[BaseModel], Any], default: Any
) -> dict[str, Any]:
    """Return the schema of one choice: a name, or a mapping of the name and its options."""
    bare = [n for n, c in offered.items() if not (c.options and own[c.options].get("required"))]
    variants: list[dict[str, Any]] = [{"enum": bare}] if bare else []
    by_options: dict[type[BaseModel] | None, list[str]] = {}
    for name, choice in offered.items():
        by_options.setdefault(choice.options, []).append(name)
    for model, names in by_options.items():
        options = own[model] if model is not None else {}
        variants.append(
            {
                "type": "object",
                "properties": {"name": {"enum": names}, **options.get("properties", {})},
                "required": ["name", *options.get("required", [])],
                "additionalProperties": False,
            }
        )
    if default is None:
        variants.append({"type": "null"})
    schema: dict[str, Any] = {"anyOf": variants} if variants else {"not": {}}
    return schema if default == [] else {**schema, "default": default}


def _by_choice(offered: Mapping[str, Choice]) -> list[tuple[Choice, list[str]]]:
    """Return each choice once with the names it goes by."""
    names: dict[Choice, list[str]] = {}
    for name, choice in offered.items():
        names.setdefault(choice, []).append(name)
    return list(names.items())


def _definitions(
    options: Iterable[type[BaseModel] | None],
) -> tuple[dict[str, Any], dict[type[BaseModel], Any]]:
    """Return ($defs of the models inside, the schema of each model itself)."""
    models: list[type[BaseModel]] = [Settings, *(model for model in options if model is not None)]
    refs, schema = models_json_schema([(m, "validation") for m in dict.fromkeys(models)])
    definitions: dict[str, Any] = schema["$defs"]
    for definition in definitions.values():
        if "properties" in definition:
            definition["additionalProperties"] = False
    own = {m: definitions[_name_of(refs[m, "validation"])] for m in models}
    text = json.dumps(definitions)
    inner = {name: d for name, d in definitions.items() if f'"#/$defs/{name}"' in text}
    return inner, own


def _name_of(ref: Mapping[str, Any]) -> str:
    return str(ref["$ref"]).rpartition("/")[2]
