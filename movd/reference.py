"""Read the image that a video begins with: from an untrusted file to a frame of the video's size."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from blockstream.errors import ConfigError
from blockstream.system import regular

if TYPE_CHECKING:
    from PIL.Image import Image

#: The decoders a file may reach.
FORMATS = ("PNG", "JPEG", "WEBP")
MOST_NBYTES = 64 << 20
#: What decoding may hold: 64 million pixels are 192 MB.
MOST_PIXELS = 64_000_000


def read_reference(path: Path, height: int, width: int) -> Tensor:
    """Return the frame [1, 3, 1, height, width] in -1..1 of an image file.

    The image is turned as its EXIF data say, laid on black where it is transparent, scaled (bicubic) to
    cover the frame and cut about its centre, as in Open-Sora. Raises ConfigError, naming the file, for
    what is no sound image of `FORMATS` or too large.
    """
    from PIL import Image, ImageOps

    with _refusing(path):
        regular.check(path, MOST_NBYTES)
        with Image.open(path, formats=FORMATS) as image:
            _check_size(image)
            image.verify()
        with Image.open(path, formats=FORMATS) as image:  # verify leaves an image that cannot be decoded
            _check_size(image)
            turned = ImageOps.exif_transpose(image)
            frame = ImageOps.fit(_rgb(turned), (width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(frame)).permute(2, 0, 1)
    return (pixels.float() / 127.5 - 1)[None, :, None]


def digest(path: Path) -> str:
    """Return what tells a file's bytes from others; raises as `read_reference`."""
    with _refusing(path):
        return hashlib.sha256(regular.read_bytes(path, MOST_NBYTES)).hexdigest()[:16]


def _check_size(image: Image) -> None:
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise ValueError(f"{width} x {height} pixels, the most an image may have is {MOST_PIXELS:,}")


def _rgb(image: Image) -> Image:
    """Return an image of any mode as RGB, on black where it is transparent."""
    from PIL import Image as Images

    if image.mode.startswith("I;16"):  # convert() would cut these at 255
        image = Images.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    black = Images.new("RGBA", rgba.size, (0, 0, 0, 255))
    return Images.alpha_composite(black, rgba).convert("RGB")


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Turn everything a decoder may raise about a file into one error."""
    from PIL import UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            # Pillow warns of images as large as a bomb, and of damaged metadata that it passes over.
            warnings.simplefilter("ignore")
            yield
    except FileNotFoundError as error:
        raise ConfigError(f"reference {path}: there is no such file") from error
    except UnidentifiedImageError as error:
        raise ConfigError(f"reference {path}: is no {', '.join(FORMATS)} image") from error
    except MemoryError:
        raise
    except Exception as error:  # decoders raise SyntaxError, struct.error, ValueError and more
        raise ConfigError(f"reference {path}: cannot be used: {error}") from error
