"""An export killed at any change of a file, or out of disk there, is finished by the same command."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.support import faults
from tests.support.coreml import need_coremltools

#: The conversion itself is coremltools' and takes seconds a segment: here it writes a package of two files.
EXPORT = """
import shutil
import torch
from blockstream.run.config import make_config
from movd_coreml import export as module
from movd_coreml.manifest import open_export
from movd_coreml.tools import coremltools
from tests.support.movd_models import write_dit, write_t5, write_vae

STEP = 11
torch.set_num_threads(1)
MODELS = Path(sys.argv[1]) / "models"
write_t5(MODELS / "t5", d_model=32, d_ff=48, d_kv=8, num_heads=4, feed_forward_proj="gated-gelu")
write_dit(MODELS / "dit", depth=1, caption_channels=32, model_max_length=8)
temporal = {"filters": 4, "num_res_blocks": 1, "num_groups": 2, "channel_multipliers": [1, 2, 2]}
write_vae(MODELS / "vae", temporal={**temporal, "temporal_downsample": [True, True]})
KEYS = {"pipeline": "movd", "prompt": "a red star", "height": 16, "width": 16, "frames": 17, "steps": 2}
CONFIG = make_config({**KEYS, "threads": 1, **{p: {"path": str(MODELS / p)} for p in ("t5", "dit", "vae")}})
coremltools()


def convert(what, built, inputs, names, form, path):
    (path / "Data").mkdir(parents=True)
    (path / "Manifest.json").write_text("{}")
    (path / "Data" / "weights").write_text(what)
    return [(1,) for _ in names]


def join(made, path):
    shutil.copytree(next(iter(made.values())), path)


module.convert, module.join = convert, join


def act(folder):
    module.export(CONFIG, folder / "out")
    open_export(folder / "out").check_files()
"""


@pytest.mark.slow
def test_an_export(tmp_path):
    need_coremltools()
    rows = faults.run(EXPORT, tmp_path / "exports", timeout=280)
    assert {row["kind"] for row in rows} == {"kill", "full"} and len(rows) > 8
    whole = None
    for row in rows:
        code = row["first"][0]
        assert code in (-signal.SIGKILL, 3, 0), row
        assert row["again"][0] == 0, row
        names = faults.names(Path(row["folder"]) / "out")
        whole = whole or names
        assert names == whole, row
    assert not [name for name in whole if "unfinished" in name or name.rpartition("/")[2].startswith(".")]
