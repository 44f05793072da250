"""Check mappings against pydantic models and say what is wrong in the user's terms.

Every problem comes back, none is raised: the path of the value, what is wrong with it, and for an
unknown key the nearest known one. Unknown keys are refused even by models that would ignore them.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from blockstream.errors import ConfigError
from blockstream.plugins.entrypoints import nearest

from .yamlfile import Document, Keys, dotted

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Problem:
    """What is wrong with the value at a path."""

    path: Keys
    message: str


def validate(
    model: type[M],
    data: Mapping[str, Any],
    path: Keys = (),
    also_known: Iterable[str] = (),
    context: Mapping[str, Any] | None = None,
) -> tuple[M | None, list[Problem]]:
    """Return (the model, []) or (None, every problem) for the mapping at `path`.

    `also_known` are keys that others take at this level: near misses of them are named too.
    """
    try:
        made = model.model_validate(dict(data), extra="forbid", context=dict(context or {}))
        problems = [Problem(path + place, said) for place, said in _switches_for_numbers(data, made)]
        return (None if problems else made), problems
    except ValidationError as error:
        problems = []
        for item in error.errors(include_url=False):
            place = _path_in(data, item["loc"], item["type"])
            problems.append(Problem(path + place, _message(model, item, also_known)))
        return None, problems


def _switches_for_numbers(given: Any, made: Any, path: Keys = ()) -> Iterator[tuple[Keys, str]]:
    """Yield where true or false was given and taken for 1 or 0, as pydantic does."""
    if isinstance(given, bool):
        if isinstance(made, int | float) and not isinstance(made, bool):
            yield path, f"write a number, not {str(given).lower()}"
    elif isinstance(given, Mapping) and isinstance(made, BaseModel):
        for name, field in type(made).model_fields.items():
            key = field.alias or name
            if key in given:
                yield from _switches_for_numbers(given[key], getattr(made, name), (*path, key))
    elif isinstance(given, list) and isinstance(made, list | tuple) and len(given) == len(made):
        for k, (one, as_made) in enumerate(zip(given, made, strict=True)):
            yield from _switches_for_numbers(one, as_made, (*path, k))


def refuse_keys(data: Iterable[str], path: Keys, known: Iterable[str] = ()) -> list[Problem]:
    """Return a problem for each key of a mapping that takes none, or none but `known`."""
    known = list(known)
    return [Problem((*path, k), f"unknown key{nearest(k, known)}") for k in data if k not in known]


def raise_problems(document: Document, problems: Iterable[Problem]) -> None:
    """Raise one ConfigError for all problems, in the order of their lines; nothing if none."""
    placed = []
    for problem in dict.fromkeys(problems):
        mark = document.mark(problem.path)
        key = dotted(problem.path) or "all of it"
        if isinstance(mark, int):
            place = f"line {mark}, {key}"
        elif mark is None or mark == f"--set {key}":
            place = mark or key
        else:
            place = f"{mark}, {key}"
        placed.append((mark if isinstance(mark, int) else math.inf, f"{place}: {problem.message}"))
    lines = [text for _, text in sorted(placed, key=lambda pair: pair[0])]
    if len(lines) == 1:
        raise ConfigError(f"{document.name}, {lines[0]}")
    if lines:
        raise ConfigError("\n  ".join([f"{document.name} has {len(lines)} problems:", *lines]))


def _message(model: type[BaseModel], item: Any, also_known: Iterable[str]) -> str:
    """Return one pydantic error as a sentence part."""
    loc, kind, given = item["loc"], item["type"], item["input"]
    if kind == "extra_forbidden":
        known = {*_keys_at(model, loc[:-1]), *(also_known if len(loc) == 1 else ())}
        return f"unknown key{nearest(str(loc[-1]), sorted(known))}"
    if kind == "missing":
        return "missing"
    message = str(item["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if kind in ("value_error", "assertion_error"):
        return message
    message = (message[:1].lower() + message[1:]).replace("valid tuple", "valid list")
    return f"{message}, not {reprlib.repr(given)}"


def _path_in(data: Any, loc: tuple[int | str, ...], kind: str) -> Keys:
    """Return the path in the data that an error's loc means: pydantic mixes in names of types."""
    path: list[int | str] = []
    for k, part in enumerate(loc):
        if isinstance(data, list):
            inside = isinstance(part, int) and part < len(data)
        else:
            inside = isinstance(data, Mapping) and part in data
        if inside:
            data = data[part]
        elif not (kind == "missing" and k == len(loc) - 1):
            continue
        path.append(part)
    return tuple(path)


def _keys_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> set[str]:
    """Return the keys that the models at a loc take."""
    models = [model]
    for part in loc:
        inner = [f for m in models for name, f in m.model_fields.items() if part in (name, f.alias)]
        if inner:
            models = [m for field in inner for m in _models_in(field.annotation)]
        else:
            # A list index, a mapping's key or the name of a union's member.
            models = [m for m in models if m.__name__ == part] or models
    return {field.alias or name for m in models for name, field in m.model_fields.items()}


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
