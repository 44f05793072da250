"""Score by the user's own VBench: a Python of its own, since vbench pins old numpy and transformers.

Its command line needs CUDA; its Python API, called here in that Python, does not.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from blockstream.errors import BlockstreamError, ConfigError
from blockstream.system import regular

from .dimensions import Dimension

#: What runs in the other Python: VBench's API on a folder, weights from its cache alone.
_PROGRAM = """
import json, os, sys
import torch, vbench
asked = json.loads(sys.argv[1])
full = os.path.join(os.path.dirname(vbench.__file__), "VBench_full_info.json")
judge = vbench.VBench(torch.device(asked["device"]), full, asked["out"])
judge.evaluate(videos_path=asked["videos"], name="blockstream", dimension_list=asked["dimensions"],
               local=True, mode="custom_input")
"""


class VBenchError(BlockstreamError):
    """The user's VBench failed; its own words are in the message."""


def cache_folder() -> Path:
    """Return the folder where vbench looks for weights."""
    named = os.environ.get("VBENCH_CACHE_DIR")
    return Path(named) if named else Path.home() / ".cache" / "vbench"


def missing(dimension: Dimension) -> list[Path]:
    """Return the files that a dimension needs and that are not there."""
    return [path for name in dimension.files if not (path := cache_folder() / name).exists()]


def evaluate(
    python: Path, videos: Path, dimensions: Iterable[Dimension], device: str = "cpu"
) -> dict[str, dict[str, float]]:
    """Return each video's score by dimension and file name, from vbench in another Python.

    Raises ConfigError where that Python is not there, VBenchError where it fails.
    """
    names = [d.name for d in dimensions]
    with tempfile.TemporaryDirectory(prefix="vbench-") as out:
        asked = {"videos": str(videos.absolute()), "out": out, "dimensions": names, "device": device}
        try:
            done = subprocess.run(
                [str(python), "-c", _PROGRAM, json.dumps(asked)], capture_output=True, text=True, check=False
            )
        except OSError as error:
            raise ConfigError(
                f"--vbench {python}: {error}; name the python of an environment with vbench 0.1.5"
            ) from error
        said = done.stderr[-2000:].strip()
        if done.returncode != 0:
            raise VBenchError(f"{python}: vbench failed on {', '.join(names)}: {said}")
        found = list(Path(out).glob("*_eval_results.json"))
        if len(found) != 1:
            raise VBenchError(f"{python}: vbench wrote {len(found)} results, not one: {said}")
        return read_results(found[0])


def read_results(path: Path) -> dict[str, dict[str, float]]:
    """Return {dimension: {file name: score}} of a file as vbench writes it.

    Scores are in vbench's own scale but for imaging quality, whose videos are in 0..100 there.
    """
    try:
        results = regular.read_json(path)
        found = {}
        for name, (_, videos) in results.items():
            scale = 100.0 if name == "imaging_quality" else 1.0
            found[name] = {Path(v["video_path"]).name: float(v["video_results"]) / scale for v in videos}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a result of vbench ({type(error).__name__}: {error})") from error
    return found
