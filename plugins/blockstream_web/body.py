"""What a page sends: a line of JSON, then the bytes of an image if there is one; limited while it comes."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request

#: As for a reference image that a config names.
MOST_IMAGE_NBYTES = 64 << 20
#: A hundred prompts of the longest that a config takes.
MOST_ASKED_NBYTES = 1 << 20


@asynccontextmanager
async def received(request: Request, folder: Path) -> AsyncIterator[tuple[dict[str, Any], Path | None]]:
    """Yield (what is asked, the file of the image or None).

    The image lies in the folder for the length of the block, unless it is moved away. Raises HTTPException:
    413 as soon as more has come than is taken, 400 for another form.
    """
    most = MOST_ASKED_NBYTES + MOST_IMAGE_NBYTES
    said = request.headers.get("content-length", "0")
    if not said.isdigit() or int(said) > most:
        raise HTTPException(413, f"more than {most >> 20} MiB are sent; that is the most")
    pieces, line = request.stream(), b""
    async for piece in pieces:
        line += piece
        if b"\n" in piece or len(line) > MOST_ASKED_NBYTES:
            break
    line, newline, rest = line.partition(b"\n")
    if len(line) > MOST_ASKED_NBYTES:
        raise HTTPException(
            413, f"settings and prompts have more than {MOST_ASKED_NBYTES >> 20} MiB; that is the most"
        )
    try:
        asked = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "a request is a line of JSON, and an image after it") from error
    if not isinstance(asked, dict):
        raise HTTPException(400, "a request is a mapping")
    path = folder / f".upload-{secrets.token_hex(8)}"
    try:
        nbytes = 0
        if newline:
            with open(path, "xb", opener=_private) as file:
                nbytes = file.write(rest)
                async for piece in pieces:
                    nbytes += len(piece)
                    if nbytes > MOST_IMAGE_NBYTES:
                        raise HTTPException(
                            413, f"the image has more than {MOST_IMAGE_NBYTES >> 20} MiB; that is the most"
                        )
                    file.write(piece)
        named = path
        if nbytes:
            named = path.replace(path.with_suffix(_suffix(path)))
        yield asked, named if nbytes else None
    finally:
        for left in folder.glob(f"{path.name}*"):
            left.unlink(missing_ok=True)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _suffix(path: Path) -> str:
    """Return the suffix of an image by its first bytes; HTTPException 400 for none of PNG, JPEG, WebP."""
    with path.open("rb") as file:
        head = file.read(12)
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return ".png"
    if head.startswith(b"\xff\xd8\xff"):
        return ".jpg"
    if head.startswith(b"RIFF") and head[8:] == b"WEBP":
        return ".webp"
    raise HTTPException(400, "the image is none of PNG, JPEG and WebP")
