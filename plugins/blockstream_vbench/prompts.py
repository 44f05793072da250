"""The user's own copy of VBench's prompts by category. None are in this package."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from blockstream.errors import ConfigError
from blockstream.system import regular

#: Where a checkout of VBench has them, a text file a category.
IN_VBENCH = "prompts/prompts_per_category"
#: What cannot be in the name of a file.
_UNSAFE = "/\0"


def read_prompts(path: Path, only: list[str] | None = None) -> dict[str, list[str]]:
    """Return the prompts by category: of a JSON file {category: [prompt, ...]}, or a folder of text files.

    Raises ConfigError for what is neither, for a prompt that cannot name a file, for one that is there twice,
    and for a category in `only` that is not there.
    """
    try:
        found = _folder(path) if path.is_dir() else _file(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--prompts {path}: {error}; name VBench's {IN_VBENCH}, or a JSON file of prompts by category"
        ) from error
    if only:
        missing = sorted(set(only) - found.keys())
        if missing:
            raise ConfigError(f"no category {', '.join(missing)} in {path} (there: {', '.join(found)})")
        found = {name: found[name] for name in found if name in only}
    for name, prompts in found.items():
        unsafe = [p for p in prompts if not p.strip() or any(c in p for c in _UNSAFE)]
        if unsafe:
            raise ConfigError(f"{path}, {name}: the prompt {unsafe[0]!r} cannot be part of a file's name")
    twice = [p for p, n in Counter(p for ps in found.values() for p in ps).items() if n > 1]
    if twice:
        raise ConfigError(f"{path}: {twice[0]!r} is there twice; a video is told by its prompt")
    return found


def part_of(prompts: list[str], part: tuple[int, int]) -> list[str]:
    """Return the prompts of one of several machines: (k, n) is the kth of n, from 1 on."""
    k, n = part
    return prompts[k - 1 :: n]


def _file(path: Path) -> dict[str, list[str]]:
    found = regular.read_json(path)
    if not isinstance(found, dict) or not all(
        isinstance(ps, list) and ps and all(isinstance(p, str) for p in ps) for ps in found.values()
    ):
        raise ValueError("not a mapping of categories to lists of prompts")
    return found


def _folder(path: Path) -> dict[str, list[str]]:
    found = {
        file.stem: [line.strip() for line in regular.read_text(file).splitlines() if line.strip()]
        for file in sorted(path.glob("*.txt"))
    }
    if not any(found.values()):
        raise ValueError("no text file with prompts is in this folder")
    return {name: prompts for name, prompts in found.items() if prompts}
