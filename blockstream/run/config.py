"""The configuration of a run: YAML plus `--set`, validated into one frozen value.

    config = load_config("movd.yaml", ["steps=10"])
    sampler = config.sampler.build()

The keys of `RunConfig` are the engine's; every other key belongs to the options of the pipeline that
is named. All that is wrong is reported at once, each with its key, its line and the nearest known key.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from blockstream.budget.amounts import parse_nbytes
from blockstream.device.names import PATTERN, parse_device
from blockstream.errors import ConfigError, PluginError
from blockstream.plugins import entrypoints
from blockstream.plugins.blame import blaming
from blockstream.plugins.choices import Chosen
from blockstream.plugins.entrypoints import nearest
from blockstream.plugins.manager import Plugins

from .validation import Problem, raise_problems, refuse_keys, validate
from .yamlfile import Document, Keys, dump, parse, read, with_set

log = logging.getLogger(__name__)


def _amount(value: str | int) -> str | int:
    """Check an amount of memory without measuring any."""
    try:
        parse_nbytes(value, headroom_nbytes=1 << 40)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    return value


def _no_percentage(value: str | int) -> str | int:
    if isinstance(value, str) and value.strip().endswith("%"):
        raise ValueError(f"{value!r}: a percentage is for the budget; write an amount or auto")
    return value


def _device(value: Any) -> Any:
    try:
        return parse_device(value)
    except ConfigError as error:
        raise ValueError(str(error)) from error


#: More than any machine computes with.
MOST_THREADS = 1024


def _threads(value: Any) -> Any:
    if value != "auto" and (type(value) is not int or not 1 <= value <= MOST_THREADS):
        raise ValueError(f"{value!r} is no number of threads; write auto or a whole number to {MOST_THREADS}")
    return value


Amount = Annotated[int | str, BeforeValidator(_amount)]


class Settings(BaseModel):
    """The keys of the engine that are plain values."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    plugins: tuple[str, ...] = Field(
        (), description="plugins to load besides those that a choice names, for their observers"
    )
    budget: Amount = Field(
        "auto",
        description='limit on the memory of the process: "3.3GiB", "80%" of the headroom, auto',
    )
    arena: Annotated[Amount, AfterValidator(_no_percentage)] = Field(
        "auto", description='most bytes of weights held at once: "96MiB", or auto: what is left'
    )
    device: Annotated[str, BeforeValidator(_device)] = Field(
        "auto",
        pattern=PATTERN,
        description="where to compute: cpu, cuda, cuda:1, or auto: cuda where torch has one",
    )
    device_budget: Amount = Field(
        "auto", description='limit on what is held on the device: "8GB", "80%" of what is free there, auto'
    )
    threads: Annotated[Literal["auto"] | int, BeforeValidator(_threads)] = Field(
        "auto", description="threads that compute; changes the last bits of a result"
    )
    int8: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="how layers with int8 weights multiply; auto is the processor's fastest"
    )
    allow_nonfinite: bool = Field(
        False, description="keep what holds NaN or overflowed, with a warning, instead of ending the run"
    )
    output: str | None = Field(None, min_length=1, description="folder of the run, unless --out")


class RunConfig(Settings):
    """A validated configuration: choices are resolved to their plugins, options are models.

    `backend` None: the pipeline's own modules, computed by torch. The pipeline's options are
    `pipeline.options`; `source` is the name of the file or example, for messages.
    """

    pipeline: Chosen
    policy: Chosen
    backend: Chosen | None = None
    sampler: Chosen
    attention: tuple[Chosen, ...] = ()
    observers: tuple[Chosen, ...] = ()
    source: str = "config"

    def chosen(self) -> tuple[Chosen, ...]:
        """Return every choice, the pipeline first."""
        backend = () if self.backend is None else (self.backend,)
        return (self.pipeline, self.policy, *backend, self.sampler, *self.attention, *self.observers)

    def resolved(self) -> dict[str, Any]:
        """Return every key and value, defaults included, as YAML has them."""
        plain = self.model_dump(mode="json", include=set(Settings.model_fields))
        return {
            "pipeline": self.pipeline.ref,
            **plain,
            "policy": self.policy.written(),
            "backend": None if self.backend is None else self.backend.written(),
            "sampler": self.sampler.written(),
            "attention": [chosen.written() for chosen in self.attention],
            "observers": [chosen.written() for chosen in self.observers],
            **self.pipeline.plain_options(),
        }

    def dump(self) -> str:
        """Return the configuration as YAML that runs the same again."""
        return dump(self.resolved())


#: What the choices are when the config does not make them.
DEFAULTS: dict[str, Any] = {
    "policy": "auto",
    "backend": None,
    "sampler": "euler",
    "attention": [],
    "observers": [],
}
#: Those of which a config makes a list.
LISTED = tuple(key for key, default in DEFAULTS.items() if default == [])

#: Every key of the engine; the others are the pipeline's.
OWN_KEYS = ("pipeline", *Settings.model_fields, *DEFAULTS)


def load_config(
    path_or_name: str | Path, sets: Sequence[str] = (), plugins: Plugins | None = None
) -> RunConfig:
    """Return the configuration in a file, or in a packaged example of that name, with `--set`s.

    Imports the plugins it names and no others. Raises ConfigError listing everything that is wrong.
    """
    return make_config(read_config(path_or_name, sets), plugins)


def read_config(path_or_name: str | Path, sets: Sequence[str] = ()) -> Document:
    """Return the document of a config file or packaged example, with `--set`s applied, unvalidated.

    A file wins over an example of the same name; `document.packaged` says which package it is from.
    """
    return with_sets(_find(path_or_name), sets)


def with_sets(document: Document, sets: Sequence[str]) -> Document:
    """Return a document with `--set`s applied, unvalidated."""
    for text in sets:
        document = with_set(document, text)
    return document


def make_config(document: Document | Mapping[str, Any], plugins: Plugins | None = None) -> RunConfig:
    """Return the validated configuration of a document, or of a mapping made in Python.

    Raises ConfigError listing everything that is wrong, each with its key and line.
    """
    if not isinstance(document, Document):
        document = Document("config", dict(document))
    plugins = plugins or Plugins()
    problems: list[Problem] = []
    data = document.data
    own = {k: data[k] for k in Settings.model_fields if data.get(k) is not None}
    settings, found = validate(Settings, own)
    problems += found
    chosen = choose(document, plugins, problems)
    resolved = {
        key: [_with_options(document, path, one, problems) for path, one in found.items()]
        for key, found in chosen.items()
    }
    raise_problems(document, problems)
    assert settings is not None
    return RunConfig(
        **dict(settings),
        pipeline=resolved["pipeline"][0],
        policy=resolved["policy"][0],
        backend=next(iter(resolved["backend"]), None),
        sampler=resolved["sampler"][0],
        attention=tuple(resolved["attention"]),
        observers=tuple(resolved["observers"]),
        source=document.name,
    )


def choose(document: Document, plugins: Plugins, problems: list[Problem]) -> dict[str, dict[Keys, Chosen]]:
    """Return what a document chooses, by kind and path, its options not looked at yet.

    Imports the plugins that are named; what cannot be resolved is added to `problems`.
    """
    chosen: dict[str, dict[Keys, Chosen]] = {"pipeline": {}, **{key: {} for key in DEFAULTS}}
    listed = document.data.get("plugins")
    for i, name in enumerate(listed if isinstance(listed, list) else ()):
        with _noting(problems, ("plugins", i)):
            plugins.load(str(name))
            if not plugins.hooks_of(str(name)):
                raise PluginError(
                    f"plugin {str(name)!r} implements no hook; mark its functions with hookimpl"
                )
    for path, key, value in _choices_made(document, problems):
        ref = value.get("name") if isinstance(value, dict) else value
        if not isinstance(ref, str):
            problems.append(Problem(path, "write a name, or a mapping with `name` and options"))
            continue
        with _noting(problems, path):
            chosen[key][path] = Chosen(key, ref, *plugins.find(key, ref))
    if not chosen["pipeline"]:
        problems += _misspelt(document)
    return chosen


def _choices_made(document: Document, problems: list[Problem]) -> Iterator[tuple[Keys, str, Any]]:
    """Yield (path, kind, value as written) of each choice, defaults included."""
    for key in ("pipeline", *DEFAULTS):
        value = document.data.get(key)
        if value is None:
            value = DEFAULTS.get(key)
        if key in LISTED and isinstance(value, list):
            for i, item in enumerate(value):
                yield (key, i), key, item
        elif key in LISTED:
            problems.append(Problem((key,), "write a list of choices"))
        elif value is not None:
            yield (key,), key, value
        elif key == "pipeline":
            problems.append(Problem((key,), "missing; name the pipeline to run"))


def _with_options(document: Document, path: Keys, chosen: Chosen, problems: list[Problem]) -> Chosen:
    """Return a choice with its options validated; adds to `problems` what is wrong with them."""
    written: Any = document.data.get(str(path[0])) or chosen.ref
    for part in path[1:]:
        written = written[part]
    given = {k: v for k, v in written.items() if k != "name"} if isinstance(written, dict) else {}
    also_known: Iterable[str] = ()
    if chosen.key == "pipeline":
        problems += [Problem((*path, key), "write the pipeline's options at the top level") for key in given]
        given = {k: v for k, v in document.data.items() if k not in OWN_KEYS}
        path, also_known = (), OWN_KEYS
    model = chosen.choice.options
    taken = {"name"} if path else set(OWN_KEYS)
    if model is not None and (hidden := sorted(taken & _keys_of(model))):
        raise PluginError(
            f"{chosen.who}: the option {hidden[0]!r} cannot be set: configs use that key for something else"
        )
    if model is None:
        problems += refuse_keys(given, path, also_known)
        return chosen
    with blaming(f"{chosen.who}: its options"):
        options, found = validate(model, given, path, also_known, {"base": document.base})
    problems += found
    return replace(chosen, options=options)


def _keys_of(model: type[BaseModel]) -> set[str]:
    """Return the keys that a model is read from."""
    return {field.alias or name for name, field in model.model_fields.items()}


def _misspelt(document: Document) -> Iterator[Problem]:
    """Yield the keys that look like one of the engine's, when no pipeline tells its own."""
    for key in document.data:
        if key not in OWN_KEYS and (hint := nearest(key, OWN_KEYS)):
            yield Problem((key,), f"unknown key{hint}")


@contextmanager
def _noting(problems: list[Problem], path: Keys) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        problems.append(Problem(path, str(error)))


def _find(path_or_name: str | Path) -> Document:
    path = Path(path_or_name)
    if path.exists() and not path.is_dir():
        return read(path)
    name = str(path_or_name)
    packaged = entrypoints.examples()
    example = packaged.get(name) or packaged.get(f"{name}.yaml")
    if example is None:
        several = [full for full in packaged if full.endswith((f":{name}", f":{name}.yaml"))]
        if several:
            raise ConfigError(f"several packages have {name}; write {' or '.join(sorted(several))}")
        reason = "is not a file" if path.exists() else "does not exist"
        raise ConfigError(
            f"{name} {reason}, and no packaged example has that name{nearest(name, packaged)} "
            f"(examples: {', '.join(sorted(packaged)) or 'none'})"
        )
    try:
        file = entrypoints.example_file(example)
        text = file.read_bytes()
    except (ImportError, OSError) as error:
        raise ConfigError(f"{name}: {example.provider} lists it, but: {error}") from error
    others = [full for full, e in packaged.items() if e.name == example.name and e != example]
    if name.partition(":")[0] != example.distribution and others:
        log.warning("%s: the one of %s; %s is another", name, example.provider, " or ".join(others))
    base = file.parent if isinstance(file, Path) else None
    return replace(parse(text, example.name, base), packaged=example.provider)
