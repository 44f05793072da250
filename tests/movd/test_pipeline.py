"""What users may ask for: each kind of prompt, size and length works, or is refused with the reason."""

import av
import numpy as np
import pytest
import torch
from PIL import Image

from blockstream.engine.ledger import Ledger
from blockstream.errors import ConfigError, PluginError
from blockstream.plan.segments import AtMost, Exactly
from blockstream.run import runner
from blockstream.run.activation import activate
from movd import video
from movd.captions import official_prompt
from tests.support.interrupted import Passes

LONG = " ".join(f"word{n} moving left," for n in range(150))


def frames_of(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return np.stack(frames), float(stream.average_rate)


@pytest.mark.parametrize(
    "prompt",
    ["", "   ", "🦊🌊 a fox ❤️", "一只红色的狐狸", "<b>a star</b> http://a.com", "\ud83d\udd25 \x00 fire"],
    ids=["empty", "blank", "emoji", "chinese", "markup", "control"],
)
@pytest.mark.parametrize("aesthetic", [6.5, None])
def test_any_prompt_makes_a_video(config, tmp_path, prompt, aesthetic):
    prompt = prompt.encode("utf-16", "surrogatepass").decode("utf-16")
    runner.run(config(prompt=prompt, steps=1, aesthetic=aesthetic), tmp_path / "out")
    frames, _ = frames_of(tmp_path / "out" / "video.mp4")
    assert frames.shape == (17, 16, 16, 3)


def test_a_prompt_longer_than_the_model_reads_is_cut_and_said_to_be(config, tmp_path, caplog):
    runner.run(config(prompts=[LONG, LONG + " and a star"], steps=1), tmp_path / "out")
    assert "prompt 0 fills all 40 tokens the model reads; what follows is cut: 'word0" in caplog.text
    videos = [(tmp_path / "out" / name / "video.mp4").read_bytes() for name in ("0000", "0001")]
    assert videos[0] == videos[1]


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (
            "一只红色的狐狸",
            "prompt 0 is left empty, the model reads none of it: '一只红色的狐狸'",
        ),
        ("free download", "prompt 0 is left empty"),
        ("a star, 红色的狐狸", "prompt 0 is read without '红色的狐狸': 'a star, 红色的狐狸'"),
        ("a star of star.png", "prompt 0 is read without 'png'"),
    ],
)
def test_what_cleaning_takes_from_a_prompt_is_said(config, tmp_path, caplog, prompt, said):
    runner.plan(config(prompt=prompt))
    assert said in caplog.text


def test_nothing_is_said_of_a_prompt_that_is_read_whole(config, tmp_path, caplog):
    for prompt in ("a red star", "", "  "):
        runner.plan(config(prompt=prompt))
    assert "prompt 0" not in caplog.text


def test_three_hundred_tokens_are_read_by_a_model_of_the_official_length(config, tmp_path):
    from tests.support.movd_models import write_models

    models = write_models(tmp_path / "models", tokens=300)
    prompts = [LONG, LONG.replace("word3 moving left", "word3 moving right"), LONG + " more"]
    passes = Passes()
    own = config(**models, prompts=prompts, steps=1, cache="off")
    runner.run(own, tmp_path / "out", observers=[passes])
    assert passes.of["t5"] == 3
    videos = [(tmp_path / "out" / f"{n:04d}" / "video.mp4").read_bytes() for n in range(3)]
    assert videos[0] == videos[2]
    assert videos[0] != videos[1]


def test_prompts_that_become_the_same_caption_are_embedded_once(config, tmp_path):
    prompts = ["A red  star", "a red star", "a red star "]
    assert len({official_prompt(p) for p in prompts}) == 1
    passes = Passes()
    runner.run(config(prompts=prompts, steps=1), tmp_path / "out", observers=[passes])
    assert passes.of == {"t5": 1, "dit": 3, "vae": 3}


@pytest.mark.parametrize(
    ("frames", "latent"), [(17, 5), (18, 6), (33, 9), (34, 10), (50, 14), (51, 15), (68, 20), (204, 60)]
)
def test_every_number_of_frames_from_17_comes_out(config, tmp_path, frames, latent):
    report = runner.run(config(frames=frames, fps=12, steps=1), tmp_path / "out")
    found, fps = frames_of(tmp_path / "out" / "video.mp4")
    assert (len(found), fps) == (frames, 12)
    assert report["output"]["frames"] == frames
    from safetensors import safe_open

    with safe_open(tmp_path / "out" / "latents.safetensors", "pt") as file:
        assert file.get_slice("z").get_shape() == [1, 4, latent, 2, 2]


def test_one_frame_is_an_image(config, tmp_path):
    report = runner.run(config(frames=1), tmp_path / "out")
    assert report["output"]["files"] == ["image.png"]
    with Image.open(tmp_path / "out" / "image.png") as image:
        assert (image.size, image.mode, image.format) == ((16, 16), "RGB", "PNG")
    assert not (tmp_path / "out" / "video.mp4").exists()


@pytest.mark.parametrize("frames", [2, 9, 16])
def test_frame_counts_the_schedule_cannot_serve_are_refused_with_the_nearest(config, frames):
    with pytest.raises(ConfigError, match=rf"frames = {frames}: .* nearest counts that work are 1 and 17"):
        config(frames=frames)


@pytest.mark.parametrize(
    ("asked", "pixels"),
    [
        ({"height": 17, "width": 31}, (16, 24)),
        ({"height": 16, "width": 200}, (16, 200)),
        ({"resolution": "144p", "aspect_ratio": "9:16", "height": None, "width": None}, (144, 256)),
        ({"resolution": "144p", "aspect_ratio": "3:8", "height": None, "width": None}, (112, 312)),
    ],
)
def test_odd_sizes_come_out_as_whole_latents(config, tmp_path, asked, pixels):
    report = runner.run(config(**asked, frames=1, steps=1), tmp_path / "out")
    assert (report["output"]["height"], report["output"]["width"]) == pixels
    with Image.open(tmp_path / "out" / "image.png") as image:
        assert image.size == pixels[::-1]


@pytest.mark.parametrize("aspect_ratio", ["9:16", "16:9", "1:1"])
def test_240p_is_planned_in_every_shape(config, aspect_ratio):
    sized = config(resolution="240p", aspect_ratio=aspect_ratio, height=None, width=None)
    sizes = {"9:16": (240, 426), "16:9": (426, 240), "1:1": (320, 320)}
    assert sized.pipeline.options.size == sizes[aspect_ratio]
    assert [s["name"] for s in runner.plan(sized)["stages"]] == ["t5", "dit", "vae"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"height": 8}, "greater than or equal to 16"),
        ({"width": None}, "height and width go together"),
        ({"resolution": "240p"}, "not both"),
        ({"resolution": "241p", "height": None, "width": None}, "did you mean 240p"),
        ({"aspect_ratio": "16x9", "height": None, "width": None}, "did you mean 16:9"),
        ({"prompt": None, "prompts": None}, "write prompt or prompts"),
        ({"prompts": []}, "0 prompts"),
        ({"prompts": "nothing.txt"}, "nothing.txt"),
        ({"steps": 0}, "greater than or equal to 1"),
        ({"guidence": 3}, "did you mean 'guidance'"),
        ({"cache": "lots"}, "or off"),
        ({"cache": "50%"}, "write an amount"),
        ({"t5": {"path": "movd/tiny", "dtype": "int4"}}, "dtype"),
    ],
)
def test_what_cannot_be_made_is_refused_by_key(config, asked, said):
    with pytest.raises(ConfigError, match=said):
        config(**asked)


def test_a_file_of_prompts_is_found_beside_its_config(tmp_path, models, monkeypatch):
    from blockstream.run.config import load_config

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "prompts.txt").write_text("one\n\n  two  \n", encoding="utf-8")
    (tmp_path / "mine" / "a.yaml").write_text("pipeline: movd\nprompts: prompts.txt\n")
    (tmp_path / "other.txt").write_text("three\n")
    monkeypatch.chdir(tmp_path)
    assert load_config("mine/a.yaml").pipeline.options.texts == ("one", "two")
    assert load_config("mine/a.yaml", ["prompt=four"]).pipeline.options.texts == ("four",)
    own = load_config("mine/a.yaml", ["prompts=other.txt", "t5.path=mine"])
    assert own.pipeline.options.texts == ("three",)
    assert own.pipeline.options.t5.path == str(tmp_path / "mine")


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_weights_make_a_video(config, models, tmp_path, dtype):
    halves = {part: {**models[part], "dtype": dtype} for part in ("t5", "dit", "vae")}
    reference = Image.new("RGB", (20, 20), "red")
    reference.save(tmp_path / "first.png")
    own = config(**halves, arena="2MiB", steps=1, reference=str(tmp_path / "first.png"))
    runner.run(own, tmp_path / "out")
    frames, _ = frames_of(tmp_path / "out" / "video.mp4")
    assert frames.std() > 0


def test_stages_are_declared_with_the_passes_they_make(config, tmp_path, monkeypatch):
    from blockstream.streaming.session import Session

    declared = {}
    stage = Session.stage

    def noted(self, name, *args, **more):
        declared[name] = more["passes"]
        return stage(self, name, *args, **more)

    monkeypatch.setattr(Session, "stage", noted)
    own = config(prompts=["a", "b"], frames=51, steps=4, sampler={"name": "lpl", "leap": 2})
    report = runner.run(own, tmp_path / "out")
    assert declared == {"t5": 2, "dit": AtMost(2 * 3), "vae": Exactly(2 * 3)}
    assert {s["name"]: s["passes"] for s in report["stages"]} == {"t5": 2, "dit": 6, "vae": 6}
    assert [said["passes"] for said in report["output"]["sampler"]] == [3, 3]


def test_steps_that_merge_are_predicted_to_take_less(config, tmp_path):
    def planned(**more):
        own = config(prompts=["a", "b"], frames=51, steps=4, **more)
        run = runner.RunInProgress(own, runner.NOWHERE, Ledger(), activate(own))
        with runner.open_session(run) as session:
            own.pipeline.build().declare(session, run)
            return session.draft().schedule.stages[session.names.index("dit")]

    merging = planned(attention=[{"name": "tdtm", "merge_steps": "50%"}])
    first, second, third, fourth = merging.pace[:4]
    assert merging.pace == (first, second, third, fourth) * 2
    assert 0.3 < first == second < third == fourth == 1
    assert planned().pace == planned(attention=[{"name": "tdtm", "merge_steps": 0}]).pace == ()


def test_a_failure_in_the_middle_of_a_video_leaves_no_half_of_it(config, tmp_path, monkeypatch):
    from movd.text_to_video import pipeline

    def broken(x, **how):
        raise RuntimeError("the encoder broke")

    monkeypatch.setattr(pipeline, "to_frames", broken)
    with pytest.raises(PluginError, match="RuntimeError: the encoder broke"):
        runner.run(config(), tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"config.yaml", "files.jsonl", "ledger.jsonl", "latents.safetensors", "state"}
    monkeypatch.undo()
    runner.run(config(cache="off"), tmp_path / "out", resume=True)
    assert (tmp_path / "out" / "video.mp4").exists()


def test_nothing_of_a_run_is_left_in_torch(config, tmp_path):
    before = torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_inference_mode_enabled()
    runner.run(config(steps=1), tmp_path / "out")
    assert before == (
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.is_inference_mode_enabled(),
    )


def test_what_cannot_write_a_video_ends_a_run_before_it_computes_and_no_plan(config, tmp_path, monkeypatch):
    def broken(*_):
        asked.append("video")
        raise OSError("no codec")

    asked = []
    monkeypatch.setattr(video, "write_video", broken)
    assert runner.plan(config())["stages"]
    assert asked == ["video"]  # a plan holds what a run does, so that its least is a run's
    with pytest.raises(ConfigError, match="videos cannot be written here: OSError: no codec"):
        runner.run(config(), tmp_path / "out")
    assert not list(tmp_path.rglob("ledger*"))
