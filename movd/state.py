"""What a run leaves on disk as it goes: the folder of each prompt and its latents."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

LATENTS = "latents.safetensors"


class Progress:
    """The folders of a run's prompts: `out` itself for one, out/0000, out/0001, ... for several."""

    def __init__(self, out: Path, prompts: int, resumed: bool = False) -> None:
        self._out = out
        self._several = prompts > 1
        self.resumed = resumed

    def folder(self, n: int) -> Path:
        """Return the folder of prompt `n`, made if need be."""
        folder = self._out / f"{n:04d}" if self._several else self._out
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def save_latents(self, n: int, z: Tensor) -> None:
        """Write the latents [1, 4, T', h, w] of prompt `n`, all or nothing."""
        path = self.folder(n) / LATENTS
        temporary = path.with_name(f".{path.name}.part")
        try:
            save_file({"z": z.contiguous()}, temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def latents(self, n: int) -> Tensor:
        """Return the latents of prompt `n`."""
        return load_file(self.folder(n) / LATENTS)["z"]
