"""NaN and overflow in any stage are found where they arise; a black picture needs asking for."""

import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from blockstream.errors import NonFiniteError
from blockstream.run import runner


def spoiled(folder, to, part, value):
    """Copy a checkpoint with the first tensor of a name made of a value."""
    shutil.copytree(folder, to)
    for path in sorted(to.iterdir()):
        if path.suffix not in (".safetensors", ".bin"):
            continue
        packed = path.suffix == ".safetensors"
        tensors = load_file(path) if packed else torch.load(path, weights_only=True)
        for name in [k for k, t in tensors.items() if part in k and t.dim() > 1][:1]:
            tensors[name] = torch.full_like(tensors[name], value)
            save_file(tensors, path, metadata={"format": "pt"}) if packed else torch.save(tensors, path)
    return {"path": str(to)}


CASES = {
    "dit": ("blocks", "nan", "what the model gives in step 1 of 2: ", r"blocks\.0\.\S+ of stage dit"),
    "vae": ("decoder.conv_in", "inf", "the VAE's frames? 0.* of prompt 0: ", r"conv_in\S* of stage vae"),
    "t5": ("block.0", "nan", "t5's embedding of 'a red star", r"block\.0\.\S+ of stage t5"),
}


@pytest.mark.parametrize("part", CASES)
def test_what_is_not_finite_ends_the_run_with_where_it_arose(config, models, tmp_path, part):
    name, value, said, module = CASES[part]
    own = {part: spoiled(models[part]["path"], tmp_path / part, name, float(value)), "cache": "off"}
    with pytest.raises(NonFiniteError, match=f"{said}.*not finite.* begin in .*{module}.*--allow-nonfinite"):
        runner.run(config(**own, frames=1), tmp_path / "out")
    assert not (tmp_path / "out" / "image.png").exists()


@pytest.mark.parametrize("part", CASES)
def test_what_is_not_finite_is_kept_where_that_is_asked_for(config, models, tmp_path, part, caplog):
    name, value, *_ = CASES[part]
    own = {part: spoiled(models[part]["path"], tmp_path / part, name, float(value)), "cache": "off"}
    runner.run(config(**own, frames=1, allow_nonfinite=True), tmp_path / "out")
    assert "not finite" in caplog.text and "kept, as allowed" in caplog.text
    with Image.open(tmp_path / "out" / "image.png") as image:
        assert image.size == (16, 16)
