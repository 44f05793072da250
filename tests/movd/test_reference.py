"""The image a video begins with: decoded safely, fitted, and left as it is by the flow."""

import io
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load

from blockstream.errors import ConfigError
from blockstream.run import runner
from movd import reference
from movd.reference import read_reference
from movd.weights import Weights
from tests.support.interrupted import Passes
from tests.support.movd_tiny import vae


def gradient(width, height, mode="RGB"):
    x = np.linspace(0, 255, width, dtype=np.uint8)[None].repeat(height, 0)
    y = np.linspace(0, 255, height, dtype=np.uint8)[:, None].repeat(width, 1)
    return Image.fromarray(np.stack([x, y, np.full_like(x, 128)], -1)).convert(mode)


def saved(image, path, **more):
    image.save(path, **more)
    return path


@pytest.mark.parametrize("name", ["image.png", "image.webp"])
def test_a_frame_is_the_image_in_minus_one_to_one(tmp_path, name):
    image = gradient(24, 16)
    x = read_reference(saved(image, tmp_path / name, lossless=True), 16, 24)
    assert x.shape == (1, 3, 1, 16, 24)
    back = ((x[0, :, 0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(back, np.asarray(image))


def test_another_shape_covers_the_frame_and_is_cut_about_its_centre(tmp_path):
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 255  # the middle third
    path = saved(Image.fromarray(wide), tmp_path / "wide.png")
    x = read_reference(path, 16, 16)
    assert x.min() > 0.8
    assert read_reference(path, 16, 48).mean() < 0


def test_a_photograph_is_turned_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:, :16] = 255  # the left half, which becomes the upper one
    path = saved(Image.fromarray(upright), tmp_path / "photo.jpg", exif=exif, quality=95)
    x = read_reference(path, 32, 16)
    assert x[0, :, 0, :12].mean() > 0.9
    assert x[0, :, 0, 20:].mean() < -0.9


@pytest.mark.parametrize("mode", ["L", "P", "1", "LA", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    if mode == "I;16":
        image = Image.fromarray(np.full((8, 8), 40000, np.uint16))
        want = 40000 / 65535 * 2 - 1
    else:
        image, want = Image.new("L", (8, 8), 255).convert(mode), 1.0
    name = "image.jpg" if mode == "CMYK" else "image.png"
    x = read_reference(saved(image, tmp_path / name), 8, 8)
    assert x.shape == (1, 3, 1, 8, 8)
    assert abs(float(x.mean()) - want) < 0.02


def test_what_is_transparent_is_black(tmp_path):
    image = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    assert read_reference(saved(image, tmp_path / "clear.png"), 8, 8).max() == -1


def test_of_a_moving_picture_the_first_frame_is_taken(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("white", "black")]
    path = saved(frames[0], tmp_path / "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert read_reference(path, 8, 8).min() > 0.95


def _bad_files():
    png = io.BytesIO()
    gradient(64, 64).save(png, "PNG")
    png = png.getvalue()
    jpeg = io.BytesIO()
    gradient(64, 64).save(jpeg, "JPEG")
    gif = io.BytesIO()
    gradient(8, 8).save(gif, "GIF")
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 0xFF
    huge = bytearray(png)
    huge[16:24] = (60000).to_bytes(4, "big") * 2  # width and height in the header
    huge[29:33] = zlib.crc32(huge[12:29]).to_bytes(4, "big")
    return {
        "text": (b"not an image", "is no PNG, JPEG, WEBP image"),
        "empty": (b"", "is no PNG, JPEG, WEBP image"),
        "gif": (gif.getvalue(), "is no PNG, JPEG, WEBP image"),
        "cut.png": (png[: len(png) // 2], "cannot be used"),
        "cut.jpg": (jpeg.getvalue()[:-200], "cannot be used"),
        "flipped.png": (bytes(flipped), "cannot be used"),
        "huge.png": (bytes(huge), "cannot be used"),
    }


BAD_FILES = _bad_files()


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_no_sound_image_is_refused_by_name(tmp_path, name):
    content, said = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name}: {said}"):
        read_reference(tmp_path / name, 16, 16)


def test_every_cut_of_a_file_is_refused_or_read(tmp_path):
    content = io.BytesIO()
    gradient(16, 16).save(content, "WEBP", lossless=True)
    whole = content.getvalue()
    path = tmp_path / "cut.webp"
    for n in range(0, len(whole), 3):
        path.write_bytes(whole[:n])
        with pytest.raises(ConfigError):
            read_reference(path, 16, 16)
    path.write_bytes(whole)
    read_reference(path, 16, 16)


def test_too_many_pixels_or_bytes_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    path = saved(gradient(64, 64), tmp_path / "image.png")
    monkeypatch.setattr(reference, "MOST_PIXELS", 64 * 64 - 1)
    with pytest.raises(ConfigError, match="64 x 64 pixels, the most an image may have is 4,095"):
        read_reference(path, 16, 16)
    monkeypatch.setattr(reference, "MOST_NBYTES", 100)
    with pytest.raises(ConfigError, match="bytes or more, at most 100 are read"):
        read_reference(path, 16, 16)


def test_a_file_of_any_size_is_refused_without_being_read(tmp_path):
    with (tmp_path / "image.png").open("wb") as file:
        file.truncate(1 << 40)
    for read in (reference.digest, lambda path: read_reference(path, 16, 16)):
        with pytest.raises(ConfigError, match=r"reference .*image\.png.*has 1,099,511,627,776 bytes or more"):
            read(tmp_path / "image.png")


def test_a_file_that_is_not_there_or_no_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="there is no such file"):
        read_reference(tmp_path / "nothing.png", 16, 16)
    with pytest.raises(ConfigError, match="is a folder; only regular files are read"):
        read_reference(tmp_path, 16, 16)


# -- in runs ---------------------------------------------------------------------------------------


def test_a_video_begins_with_the_encoded_image_and_generates_the_rest(config, tmp_path, models):
    path = saved(gradient(40, 20), tmp_path / "image.png")
    own = config(reference=str(path), height=16, width=24, frames=34)
    passes = Passes()
    runner.run(own, tmp_path / "out", observers=[passes])
    assert passes.of == {"vae-encoder": 1, "t5": 1, "dit": 2, "vae": 2}
    z = load((tmp_path / "out" / "latents.safetensors").read_bytes())["z"]
    resident = resident_vae(own)
    want = resident.encode(read_reference(path, 16, 24), sample=False)
    assert torch.equal(z[:, :, :1], want)
    without = config(height=16, width=24, frames=34)
    runner.run(without, tmp_path / "without")
    other = load((tmp_path / "without" / "latents.safetensors").read_bytes())["z"]
    assert not torch.equal(z[:, :, 1:], other[:, :, 1:])


def resident_vae(config):
    import json
    from pathlib import Path

    folder = Path(config.pipeline.options.vae.path)
    model = vae(**json.loads((folder / "config.json").read_text()))
    model.load_state_dict(load((folder / "model.safetensors").read_bytes()))
    return model


def test_the_encoder_loads_nothing_of_the_decoder(config):
    weights = Weights(config().pipeline.options)
    assert not [name for name, _ in weights.encoder().named_parameters() if "decoder" in name]
    assert not [name for name, _ in weights.decoder().named_parameters() if "encoder" in name]


def test_the_encoder_runs_in_the_order_it_declares(config, tmp_path, caplog):
    path = saved(gradient(40, 20), tmp_path / "image.png")
    runner.run(config(reference=str(path), policy="none"), tmp_path / "out")
    assert "left its order" not in caplog.text


def test_a_reference_of_a_single_frame_is_refused(config):
    with pytest.raises(ConfigError, match="frames = 1 nothing is left"):
        config(reference="image.png", frames=1)


def test_a_missing_reference_is_refused_before_anything_runs(config, tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.png: there is no such file"):
        runner.run(config(reference=str(tmp_path / "nothing.png")), tmp_path / "out")
    assert not (tmp_path / "out" / "state").exists()
