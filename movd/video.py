"""Frames to files: H.264 in mp4, a still as PNG."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from torch import Tensor

from blockstream.errors import ConfigError

#: x264: a constant rate factor that is visually lossless for small clips. Without the macroblock tree, which
#: on frames of few blocks reads memory it never wrote, so that the same frames gave other bytes now and then.
ENCODING = {"crf": "18", "x264-params": "mbtree=0"}


def to_frames(x: Tensor, *, truncate: bool = False) -> np.ndarray:
    """Return uint8 frames [T, H, W, 3] of one clip [3, T, H, W] in -1..1, rounded or `truncate`d to bytes."""
    if truncate:
        pixels = x.float().mul(127.5).add(127.5).clamp(0, 255)
    else:
        pixels = x.float().clamp(-1, 1).add(1).mul(127.5).round()
    return pixels.byte().permute(1, 2, 3, 0).contiguous().numpy()


def check_encoder() -> None:
    """Encode one frame in memory: what cannot write a video is found before anything is computed.

    Raises ConfigError with the cause.
    """
    try:
        write_video(io.BytesIO(), [np.zeros((1, 16, 16, 3), np.uint8)], 24)
    except Exception as error:
        raise ConfigError(
            f"videos cannot be written here: {type(error).__name__}: {error}; reinstall av (pip install av), "
            "or make images with frames: 1"
        ) from error


def write_video(path: Path | io.BytesIO, chunks: Iterable[np.ndarray], fps: int) -> int:
    """Write an mp4 from uint8 chunks [n, H, W, 3] as they come; return the number of frames.

    Sizes are even, as every size of the VAE is.
    """
    import av

    count = 0
    target = path if isinstance(path, io.BytesIO) else str(path)
    with av.open(target, "w", format="mp4") as container:
        stream = None
        for frames in chunks:
            for frame in frames:
                if stream is None:
                    stream = container.add_stream("libx264", rate=fps, options=ENCODING)
                    stream.height, stream.width = frame.shape[:2]
                    stream.pix_fmt = "yuv420p"
                    stream.thread_count = 1  # x264 holds a buffer a thread
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
                count += 1
        if stream is not None:
            container.mux(stream.encode())
    return count


def write_image(path: Path, frame: np.ndarray) -> None:
    """Write one uint8 frame [H, W, 3] as PNG."""
    from PIL import Image

    Image.fromarray(frame).save(path, format="PNG")
