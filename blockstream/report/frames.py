"""Read videos and pictures back as frames. PyAV and Pillow, where they are installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blockstream.errors import ConfigError
from blockstream.system import regular

#: [H, W, 3] uint8.
Frame = NDArray[np.uint8]


def read_frames(path: Path) -> Iterator[Frame]:
    """Yield the frames of a video, or the one of a picture.

    Raises ConfigError for a file that is missing or no video, and where PyAV or Pillow is not installed.
    """
    try:
        regular.check(path)
        if path.suffix == ".mp4":
            with _library("av").open(str(path)) as video:
                for frame in video.decode(video=0):
                    yield frame.to_ndarray(format="rgb24")
        else:
            with _library("PIL.Image").open(path) as picture:
                yield np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, IndexError) as error:  # PyAV's own errors are OSErrors and ValueErrors
        raise ConfigError(f"{path}: {error}") from error


def frame_rate(path: Path) -> float:
    """Return the frames a second of a video; raises as `read_frames`."""
    try:
        regular.check(path)
        with _library("av").open(str(path)) as video:
            return float(video.streams.video[0].average_rate)
    except (OSError, ValueError, IndexError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _library(name: str) -> Any:
    """Return an optional package, imported."""
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        package = {"av": "av", "PIL.Image": "pillow"}[name]
        raise ConfigError(
            f"reading frames needs {package}: pip install 'blockstream-engine[compare]'"
        ) from error
