"""movd with weights that lie on no disk: opened by the run, so that a config's backend supplies them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

import movd
from blockstream.plugins.choices import Choice, Chosen
from blockstream.run import runner
from blockstream.run.config import make_config
from tests.support.elsewhere import Elsewhere, Memory

TINY = Path(movd.__file__).parent / "assets" / "tiny"


def test_an_image_is_the_same_bit_for_bit_where_a_backend_supplies_all_weights(tmp_path):
    keys = {"prompt": "a red star", "height": 32, "width": 32, "frames": 1, "steps": 1, "cache": "off"}
    config = make_config({"pipeline": "movd", "threads": 1, **keys})
    memory = Memory(TINY)
    choice = Choice("mine", lambda _: Elsewhere(memory, TINY))
    backed = config.model_copy(update={"backend": Chosen("backend", "mine", "builtin", choice)})
    for own, out in ((config, "files"), (backed, "memory")):
        runner.run(own, tmp_path / out)
    a, b = (load_file(tmp_path / out / "latents.safetensors")["z"] for out in ("files", "memory"))
    assert torch.equal(a, b)
    assert {Path(name).parts[0] for name, _, _ in memory.reads} == {"t5", "dit", "vae"}
