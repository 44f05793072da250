"""What pipelines return, as files: pictures as PNG, videos as mp4, sound as WAV, all else as tensors."""

from __future__ import annotations

import wave
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

#: The names that results have, and what they are.
_PICTURES, _VIDEOS, _SOUND = ("images",), ("frames", "videos"), ("audios", "audio")
#: As movd's: a constant rate factor that is visually lossless; the same bytes for the same frames.
_ENCODING = {"crf": "18", "x264-params": "mbtree=0"}


@dataclass(frozen=True)
class Result:
    """One file to be: `stem` and `suffix` of its name, and its values.

    Pictures and frames are uint8 [T, H, W, C], sound int16 [samples, channels], others tensors.
    """

    stem: str
    suffix: str
    value: Any

    def write(self, path: Path, fps: int, rate: int) -> None:
        """Write it; `fps` frames a second of a video, `rate` samples a second of sound."""
        if self.suffix == ".png":
            from PIL import Image

            picture = self.value[0]
            Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(path, format="PNG")
        elif self.suffix == ".mp4":
            _write_video(path, self.value, fps)
        elif self.suffix == ".wav":
            with wave.open(str(path), "wb") as file:
                file.setnchannels(self.value.shape[1])
                file.setsampwidth(2)
                file.setframerate(rate)
                file.writeframes(np.ascontiguousarray(self.value, "<i2").tobytes())
        else:
            from safetensors.torch import save_file

            save_file({self.stem: self.value}, path)


def results_of(made: Mapping[str, Any]) -> tuple[list[Result], dict[str, Any]]:
    """Return the files of a pipeline's output, and what else it says that JSON can hold."""
    files, said = list[Result](), dict[str, Any]()
    for name, value in made.items():
        if value is None:
            continue
        if name in _PICTURES:
            files += _numbered("image", ".png", [_bytes(one) for one in _items(value)])
        elif name in _VIDEOS:
            for kind, clips in _clips(value).items():
                files += _numbered(*kind, clips)
        elif name in _SOUND:
            files += _numbered("audio", ".wav", [_samples(one) for one in _items(value)])
        elif isinstance(value, np.ndarray | torch.Tensor):
            files.append(Result(name, ".safetensors", torch.as_tensor(value).detach().cpu().contiguous()))
        else:
            said[name] = value if isinstance(value, bool | int | float | str | list) else str(value)
    return files, said


def floats_of(made: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the floating results by name, which may hold what is not finite."""
    for name, value in made.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, np.ndarray | torch.Tensor):
                tensor = torch.as_tensor(one)
                if tensor.is_floating_point():
                    yield name, tensor


def _numbered(stem: str, suffix: str, values: Sequence[Any]) -> list[Result]:
    if len(values) == 1:
        return [Result(stem, suffix, values[0])]
    return [Result(f"{stem}-{n}", suffix, value) for n, value in enumerate(values)]


def _clips(value: Any) -> dict[tuple[str, str], list[Any]]:
    """Return clips, those of one frame as pictures."""
    clips = [_bytes(one) for one in _items(value)]
    kinds: dict[tuple[str, str], list[Any]] = {}
    for clip in clips:
        kinds.setdefault(("image", ".png") if len(clip) == 1 else ("video", ".mp4"), []).append(clip)
    return kinds


def _items(value: Any) -> Sequence[Any]:
    """Return the items of a batch."""
    return value if isinstance(value, list) else list(value)


def _bytes(item: Any) -> np.ndarray:
    """Return a picture or a clip as uint8 [T, H, W, C], rounded as diffusers rounds pictures."""
    if isinstance(item, list):
        return np.concatenate([_bytes(one) for one in item])
    if isinstance(item, torch.Tensor):
        array = item.detach().cpu().float().movedim(-3, -1).numpy()
    else:
        array = np.asarray(item)
    if array.ndim == 2:  # a grey picture
        array = array[..., None]
    if array.dtype != np.uint8:
        array = (array.clip(0, 1) * 255).round().astype(np.uint8)
    return array if array.ndim == 4 else array[None]


def _samples(item: Any) -> np.ndarray:
    """Return sound as int16 [samples, channels]."""
    array = torch.as_tensor(item).detach().cpu().float().numpy()
    array = array[:, None] if array.ndim == 1 else array.T
    return (array.clip(-1, 1) * 32767).round().astype(np.int16)


def _write_video(path: Path, frames: np.ndarray, fps: int) -> None:
    """Write an mp4 of uint8 frames [T, H, W, C]."""
    import av

    height, width = frames.shape[1:3]
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options=_ENCODING)
        stream.height, stream.width = height, width
        stream.pix_fmt = "yuv444p" if height % 2 or width % 2 else "yuv420p"
        stream.thread_count = 1  # x264 holds a buffer a thread
        for frame in frames:
            rgb = np.repeat(frame, 3, axis=-1) if frame.shape[-1] == 1 else frame[..., :3]
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24"))
            )
        container.mux(stream.encode())
