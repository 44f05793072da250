"""What the page may set, told from the JSON schema of a config: numbers, switches, choices and a few texts.

A text can name a file of this machine. So only those texts are offered that a pipeline reads as words or as
an amount; every other value stays what the preset says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from blockstream.errors import ConfigError

#: The keys whose text is words or an amount, never a path.
TEXTS = frozenset(
    {"negative", "suffix", "resolution", "aspect_ratio", "budget", "device_budget", "arena", "device"}
)
#: Kinds of plugins that the page lets choose from: one of them, or several.
ONE_OF, SEVERAL_OF = ("sampler", "policy"), ("attention",)
#: Keys in the order that the page shows them; the first are always in view.
FIRST = ("seed", "frames", "steps", "guidance")
MEMORY = ("budget", "device_budget", "arena", "policy", "device")
#: Not the page's: what a run is called, where it goes, how it is kept.
OTHERS = frozenset(
    {"pipeline", "prompt", "prompts", "reference", "plugins", "output", "backend", "save_every"}
)
#: The longest text of a field, and the most prompts a page sends.
MOST_TEXT, MOST_PROMPTS = 1000, 100

Field = dict[str, Any]


def field_of(key: str, schema: Mapping[str, Any]) -> Field | None:
    """Return what the page shows for a property of a schema; None for one that it may not set."""
    variants = [v for v in schema.get("anyOf", [schema]) if v.get("type") != "null"]
    field: Field = {
        "key": key,
        "label": key.replace("_", " "),
        "help": schema.get("description", ""),
        "empty": len(variants) < len(schema.get("anyOf", [schema])),
        "default": schema.get("default"),
    }
    if variants and all("enum" in v or "const" in v for v in variants):
        choices = [c for v in variants for c in v.get("enum", [v.get("const")])]
        return {**field, "kind": "choice", "choices": choices}
    numbers = [v for v in variants if v.get("type") in ("integer", "number")]
    if numbers and all(v in numbers or "pattern" in v for v in variants):
        field |= _bounds(numbers) if len(numbers) == 1 else {}
        whole = all(v["type"] == "integer" for v in numbers)
        return {**field, "kind": "integer" if whole else "number"}
    if [v.get("type") for v in variants] == ["boolean"]:
        return {**field, "kind": "switch"}
    items = variants[0].get("items", {}) if len(variants) == 1 else {}
    if "enum" in items:
        return {**field, "kind": "several", "choices": items["enum"]}
    if key in TEXTS and any(v.get("type") == "string" for v in variants):
        return {**field, "kind": "text"}
    return None


def _bounds(numbers: Sequence[Mapping[str, Any]]) -> Field:
    found = numbers[0]
    bounds = {"min": found.get("minimum"), "max": found.get("maximum")}
    return {k: v for k, v in bounds.items() if v is not None}


def choice_of(key: str, schema: Mapping[str, Any]) -> Field:
    """Return what the page shows for a kind of plugins: each one's name and the options it may set."""
    several = key in SEVERAL_OF
    variants = (schema["items"] if several else schema).get("anyOf", [])
    offered = [one for v in variants if v.get("type") == "object" for one in _offers(v)]
    label = key.replace("_", " ")
    kind = "plugins" if several else "plugin"
    return {"key": key, "label": label, "help": "", "kind": kind, "offers": offered}


def _offers(variant: Mapping[str, Any]) -> Iterator[Field]:
    """Yield what a page offers of one variant; nothing where it needs an option that the page may not set."""
    names = variant["properties"]["name"]["enum"]
    found = {k: field_of(k, s) for k, s in variant["properties"].items() if k != "name"}
    if any(found.get(key) is None for key in variant["required"] if key != "name"):
        return
    fields = [field for field in found.values() if field is not None]
    for name in names:
        plugin, colon, _ = name.partition(":")
        if not (colon and plugin in names):
            yield {"name": name, "fields": fields}


def fields_of(schema: Mapping[str, Any]) -> list[Field]:
    """Return the page's fields in order, each with its `group`: first, memory or more."""
    found: dict[str, Field] = {}
    for key, property_ in schema["properties"].items():
        if key in (*ONE_OF, *SEVERAL_OF):
            found[key] = choice_of(key, property_)
        elif key not in OTHERS and (field := field_of(key, property_)) is not None:
            found[key] = field
    order = {key: n for n, key in enumerate((*FIRST, *ONE_OF, *SEVERAL_OF, *MEMORY))}
    for key, field in found.items():
        first = key in (*FIRST, "sampler", "attention")
        field["group"] = "first" if first else "memory" if key in MEMORY else "more"
    return sorted(found.values(), key=lambda field: order.get(field["key"], len(order)))


def accepted(fields: Sequence[Field], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of the page as values of a config.

    Raises ConfigError for a key that is not the page's to set and for a value of another kind; whether the
    value is good is for the config to say.
    """
    by_key = {field["key"]: field for field in fields}
    found = {}
    for key, value in settings.items():
        if key not in by_key:
            raise ConfigError(f"{key!r:.80} is not for the page to set; write it into a config of your own")
        found[key] = _taken(by_key[key], value)
    return found


def _taken(field: Field, value: Any) -> Any:
    key, kind = field["key"], field["kind"]
    if kind == "plugin":
        return _chosen(field, value)
    if kind == "plugins":
        if not isinstance(value, list) or len(value) > len(field["offers"]):
            raise ConfigError(f"{key}: write a list of choices, each once")
        return [_chosen(field, one) for one in value]
    if value is None and field["empty"]:
        return None
    fits = {
        "integer": type(value) is int,
        "number": type(value) in (int, float),
        "switch": type(value) is bool,
        "choice": type(value) is not bool and value in field.get("choices", ()),
        "text": isinstance(value, str) and len(value) <= MOST_TEXT,
        "several": isinstance(value, list) and all(v in field.get("choices", ()) for v in value),
    }[kind]
    if not fits:
        raise ConfigError(f"{key}: {value!r:.80} is no value for it: {field['help'] or kind}")
    return value


def _chosen(field: Field, value: Any) -> Any:
    options = dict(value) if isinstance(value, Mapping) else {"name": value}
    name = options.pop("name", None)
    offer = next((one for one in field["offers"] if one["name"] == name), None)
    if offer is None:
        names = ", ".join(one["name"] for one in field["offers"])
        raise ConfigError(f"{field['key']}: {name!r:.80} is not offered here (offered: {names})")
    given = accepted(offer["fields"], options)
    return {"name": name, **given} if given else name
