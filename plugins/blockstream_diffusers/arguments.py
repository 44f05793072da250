"""What a pipeline's call takes, told from its signature: names checked, files read."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints

from blockstream.errors import ConfigError
from blockstream.plugins import entrypoints
from blockstream.report.frames import read_frames
from blockstream.system import regular

#: What the run says itself, and how a config says it.
_OWN = {
    "prompt": "write prompt or prompts at the top level",
    "generator": "write seed at the top level",
    "output_type": "pictures are written as PNG, videos as mp4, sound as WAV",
    "return_dict": "results are written to files",
    "callback": "a config holds no code",
    "callback_steps": "a config holds no code",
    "callback_on_step_end": "a config holds no code",
    "callback_on_step_end_tensor_inputs": "a config holds no code",
}


class Arguments:
    """The arguments of one pipeline's call, checked against what it takes; files are read when asked for.

    Raises ConfigError naming an argument that it has not, the nearest it has, and a file that is not there.
    """

    def __init__(self, pipe: Any, given: Mapping[str, Any], has_prompt: bool) -> None:
        call = type(pipe).__call__
        parameters = inspect.signature(call).parameters
        self.who, self.given = type(pipe).__name__, dict(given)
        self.defaults = {
            name: p.default
            for name, p in parameters.items()
            if name != "self" and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        }
        # What takes any names beside its own does so for old ones, and ignores the others.
        self._takes_any = not self.defaults
        try:
            hints: Mapping[str, Any] = get_type_hints(call)
        except Exception:  # names that the library imports for its checkers alone
            hints = {name: p.annotation for name, p in parameters.items()}
        self._hints = {name: str(hint) for name, hint in hints.items()}
        for name in given:
            self._check(name)
        if has_prompt and not self.takes("prompt"):
            raise ConfigError(f"prompt: {self.who} takes no prompt; leave it out")
        for path in self._files():
            if not path.is_file():
                raise ConfigError(f"{path}: {self.who} needs a file here, and there is none")

    def takes(self, name: str) -> bool:
        """Return whether the call has an argument of that name."""
        return name in self.defaults or self._takes_any

    def values(self) -> dict[str, Any]:
        """Return the arguments as the call takes them: pictures, frames and tensors read from their files."""
        return {
            name: _read(value) if self._names_files(name) else value for name, value in self.given.items()
        }

    def identity(self) -> dict[str, str]:
        """Return what tells the files of arguments from others."""
        found = {}
        for path in self._files():
            with regular.opened(path) as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        return found

    def _check(self, name: str) -> None:
        if name in _OWN:
            raise ConfigError(f"call.{name}: is not set here; {_OWN[name]}")
        if not self.takes(name):
            known = [x for x in self.defaults if x not in _OWN]
            raise ConfigError(
                f"call.{name}: {self.who} takes no such argument{entrypoints.nearest(name, known)} "
                f"(it takes {', '.join(known)})"
            )

    def _names_files(self, name: str) -> bool:
        """Return whether texts given for an argument are names of files: where it takes no texts itself."""
        hint = self._hints.get(name, "str")
        return not re.search(r"\bstr\b", hint) and re.search(r"Image|Tensor|ndarray", hint) is not None

    def _files(self) -> Iterator[Path]:
        for name, value in self.given.items():
            if self._names_files(name):
                for one in value if isinstance(value, list) else [value]:
                    if isinstance(one, str):
                        yield Path(one)


def _read(value: Any) -> Any:
    """Return what is in a file, or each of several: a tensor, the frames of a video, a picture."""
    if isinstance(value, list):
        return [_read(one) for one in value]
    if not isinstance(value, str):
        return value
    path = Path(value)
    regular.check(path)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        tensors = load_file(path)
        if len(tensors) != 1:
            raise ConfigError(f"{path}: holds {len(tensors)} tensors, and one is needed")
        return next(iter(tensors.values()))
    from PIL import Image

    if path.suffix == ".mp4":
        return [Image.fromarray(frame) for frame in read_frames(path)]
    return Image.fromarray(next(read_frames(path)))
