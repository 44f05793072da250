"""The tasks of a sweep: every prompt of a file, with every combination of a grid's values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from blockstream.errors import ConfigError
from blockstream.run.yamlfile import Document, with_set
from blockstream.system import regular

#: A file of prompts is no larger: a million of a thousand characters.
MOST_NBYTES = 1 << 30
#: The keys by which pipelines take prompts: a sweep gives each run its own.
PROMPTS = ("prompts", "prompt")
#: The most combinations of a grid.
MOST_CELLS = 1000
#: Runs a folder holds: file systems and object stores list no more at once.
A_FOLDER = 1000


@dataclass(frozen=True)
class Task:
    """One run: the prompts from the `first`th of the file on, with the values of one cell of the grid.

    `name` is its folder in the sweep's.
    """

    name: str
    first: int
    cell: int
    prompts: tuple[str, ...]


def read_prompts(where: str) -> tuple[list[str], str]:
    """Return the prompts of a text file, one a line, blank lines left out, and the digest of them all.

    `where` is a path or a URL that fsspec knows. Raises ConfigError for a file without any.
    """
    try:
        fs, path = url_to_fs(where)
        if isinstance(fs, LocalFileSystem):
            data = regular.read_bytes(path, MOST_NBYTES)
        else:
            with fs.open(path, "rb") as file:
                data = file.read(MOST_NBYTES + 1)
        if len(data) > MOST_NBYTES:
            raise ValueError(f"more than {MOST_NBYTES:,} bytes; cut the file up")
        found = [line.strip() for line in data.decode("utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"--prompts {where}: {error}; name a text file with a prompt a line") from error
    if not found:
        raise ConfigError(f"--prompts {where}: no prompts in it; write one a line")
    return found, hashlib.sha256("\n".join(found).encode()).hexdigest()


def grid_cells(grids: Sequence[str]) -> list[dict[str, Any]]:
    """Return every combination of the values of `KEY=[A, B]`s, as values by key; one without any for none.

    Raises ConfigError for what is no list of values.
    """
    axes: list[tuple[str, list[Any]]] = []
    for text in grids:
        key, equals, value = text.partition("=")
        # The key is dotted as in --set; the list alone is read here.
        values = with_set(Document("--grid", {}), f"values={value}").data.get("values")
        if not equals or not isinstance(values, list) or not values:
            raise ConfigError(f"--grid {text}: write KEY=[VALUE, VALUE], such as steps=[10, 30]")
        if key in (*PROMPTS, "output"):
            raise ConfigError(f"--grid {text}: every run of a sweep has its own {key}; leave it out")
        if key in (k for k, _ in axes):
            raise ConfigError(f"--grid {text}: {key} is there already; write all its values in one list")
        axes.append((key, values))
    cells = [
        dict(zip((key for key, _ in axes), chosen, strict=True))
        for chosen in product(*(values for _, values in axes))
    ]
    if len(cells) > MOST_CELLS:
        raise ConfigError(f"--grid: {len(cells):,} combinations; at most {MOST_CELLS:,} are taken")
    return cells


def as_sets(cell: Mapping[str, Any]) -> list[str]:
    """Return a cell's values as `--set` has them."""
    return [f"{key}={json.dumps(value)}" for key, value in cell.items()]


def tasks_of(prompts: Sequence[str], cells: int, batch: int) -> Iterator[Task]:
    """Yield the tasks of all cells, `batch` prompts each."""
    for cell in range(cells):
        for first in range(0, len(prompts), batch):
            yield Task(name_of(first, cell, cells), first, cell, tuple(prompts[first : first + batch]))


def name_of(first: int, cell: int, cells: int) -> str:
    """Return the folder of a task: `runs/0001/0001234`, of a grid's `runs/cell-002/0001/0001234`."""
    top = "runs" if cells == 1 else f"runs/cell-{cell:03d}"
    return f"{top}/{first // A_FOLDER:04d}/{first:07d}"
