"""The plugins of this repository can be imported here also where only their sources are."""

import sys
from importlib.util import find_spec
from pathlib import Path

from tests.support.golden import folder_of, golden

__all__ = ["folder_of", "golden"]

if find_spec("blockstream_vbench") is None:
    sys.path.append(str(Path(__file__).resolve().parents[2] / "plugins"))
