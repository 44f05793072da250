"""VBench around runs: prompts of the user's own, runs that go on, names, scores, and what is missing."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from blockstream_vbench import cli_run, external
from blockstream_vbench.dimensions import BY_NAME, DIMENSIONS, quality, quality_as_in_table
from blockstream_vbench.prompts import part_of, read_prompts
from blockstream_vbench.scores import Video, by_category, means, prompt_of, table
from safetensors.numpy import save_file

from blockstream.cli.main import main
from blockstream.errors import ConfigError
from movd.video import write_video

PROMPTS = {"animal": ["a cat", "a dog runs"], "food": ["a cake, sliced"]}


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(PROMPTS))
    return path


@pytest.fixture
def command(capsys):
    def run(*argv):
        capsys.readouterr()
        code = main([str(a) for a in argv])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(autouse=True)
def no_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path / "cache"))


def frames(seed=0, count=5):
    start = np.random.default_rng(seed).integers(0, 200, (1, 16, 16, 3))
    return (start + 8 * np.arange(count)[:, None, None, None]).astype(np.uint8)


# Prompts


def test_prompts_come_from_a_file_or_from_vbenchs_folder(tmp_path, prompts):
    folder = tmp_path / "per_category"
    folder.mkdir()
    for name, lines in PROMPTS.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n\n")
    assert read_prompts(prompts) == read_prompts(folder) == PROMPTS
    assert read_prompts(prompts, ["food"]) == {"food": PROMPTS["food"]}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"animal": ["a/cat"]}, r"'a/cat' cannot be part of a file's name"),
        ({"animal": ["a cat"], "food": ["a cat"]}, "'a cat' is there twice"),
        ({"animal": []}, "not a mapping of categories"),
        (["a cat"], "not a mapping of categories"),
    ],
)
def test_prompts_that_cannot_be_told_apart_are_refused(tmp_path, given, said):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(given))
    with pytest.raises(ConfigError, match=said):
        read_prompts(path)


def test_what_is_missing_is_named(tmp_path, prompts):
    with pytest.raises(ConfigError, match=r"no category car in .*there: animal, food"):
        read_prompts(prompts, ["car"])
    with pytest.raises(ConfigError, match="prompts/prompts_per_category"):
        read_prompts(tmp_path / "none.json")


def test_the_parts_of_several_machines_are_all_prompts_once():
    prompts = list("abcdefg")
    parts = [part_of(prompts, (k, 3)) for k in (1, 2, 3)]
    assert sorted(p for part in parts for p in part) == prompts and max(map(len, parts)) <= 3


# Runs


class Runs:
    """In the place of the runner: notes what is run, and leaves the folder as it is told."""

    def __init__(self, monkeypatch):
        self.made, self.stop = [], False
        monkeypatch.setattr("blockstream.run.runner.run", self)

    def __call__(self, config, out, *, resume=False):
        options = config.pipeline.options
        self.made.append((out.parent.name, out.name, options.seed, options.prompts, resume))
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.yaml").write_text("pipeline: movd\n")
        if self.stop:
            raise KeyboardInterrupt
        files = []
        for n, _ in enumerate(options.prompts):
            target = out / f"{n:04}" / "video.mp4"
            target.parent.mkdir(exist_ok=True)
            write_video(target, [frames(options.seed + n)], 8)
            files.append(f"{n:04}/video.mp4")
        output = {"files": files, "prompts": list(options.prompts)}
        (out / "report.json").write_text(json.dumps({"schema": 1, "stages": [], "output": output}))


def vbench_run(prompts, out, *more):
    return ["vbench", "run", "movd.yaml", "--prompts", prompts, "--out", out, "--set", "seed=7", *more]


def test_every_sample_of_a_prompt_has_a_seed_of_its_own(command, prompts, tmp_path, monkeypatch):
    runs = Runs(monkeypatch)
    code, _, _ = command(*vbench_run(prompts, tmp_path / "out", "--samples", 2))
    assert code == 0
    assert runs.made == [
        ("sample-0", "animal", 7, ("a cat", "a dog runs"), False),
        ("sample-0", "food", 7, ("a cake, sliced",), False),
        ("sample-1", "animal", 8, ("a cat", "a dog runs"), False),
        ("sample-1", "food", 8, ("a cake, sliced",), False),
    ]


def test_a_second_call_skips_what_is_finished_and_goes_on_with_what_was_stopped(
    command, prompts, tmp_path, monkeypatch
):
    runs = Runs(monkeypatch)
    out = tmp_path / "out"
    command(*vbench_run(prompts, out, "--samples", 1, "--category", "animal"))
    runs.stop = True
    assert command(*vbench_run(prompts, out, "--samples", 1))[0] == 130
    runs.stop = False
    _, said, _ = command(*vbench_run(prompts, out, "--samples", 1))
    assert [(name, resume) for _, name, _, _, resume in runs.made] == [
        ("animal", False),
        ("food", False),
        ("food", True),
    ]
    assert "animal: finished" in said and "going on" in said


@pytest.mark.parametrize("wrong", ["0/2", "3/2", "1", "a/b"])
def test_a_part_that_is_none_is_refused(command, prompts, tmp_path, wrong):
    code, _, err = command(*vbench_run(prompts, tmp_path / "out", "--part", wrong))
    assert code == 2 and "write K/N" in err


# Names


@pytest.fixture
def prepared(command, prompts, tmp_path, monkeypatch):
    """A folder of two samples of each prompt, made on two machines."""
    Runs(monkeypatch)
    for k in (1, 2):
        command(*vbench_run(prompts, tmp_path / f"machine{k}", "--samples", 2, "--part", f"{k}/2"))
    to = tmp_path / "plain"
    code, out, _ = command("vbench", "prepare", tmp_path / "machine1", tmp_path / "machine2", "--to", to)
    assert code == 0 and "6 videos of 3 prompts" in out
    return to


def test_videos_are_named_as_vbench_expects_them(prepared, tmp_path):
    names = sorted(p.name for p in prepared.glob("*.mp4"))
    assert names == sorted(f"{p}-{i}.mp4" for ps in PROMPTS.values() for p in ps for i in range(2))
    assert {prompt_of(p) for p in prepared.glob("*.mp4")} == {p for ps in PROMPTS.values() for p in ps}
    made = tmp_path / "machine1" / "sample-1" / "animal-1-of-2" / "0000" / "video.mp4"
    assert (prepared / "a cat-1.mp4").samefile(made)


def test_a_folder_is_never_mixed_with_another(command, prepared, tmp_path):
    code, _, err = command("vbench", "prepare", tmp_path / "machine1", "--to", prepared)
    assert code == 2 and "new or empty" in err
    again = tmp_path / "again"
    code, _, err = command("vbench", "prepare", *[tmp_path / "machine1"] * 2, "--to", again)
    assert code == 2 and "there already, from another folder" in err
    code, _, err = command("vbench", "prepare", tmp_path / "nothing", "--to", tmp_path / "empty")
    assert code == 2 and "no videos" in err


# Scores


def test_flicker_needs_nothing_and_the_rest_says_which_file_to_put_where(command, prepared, tmp_path):
    out = tmp_path / "scores.json"
    code, said, _ = command("vbench", "score", prepared, "--out", out)
    assert code == 0
    found = json.loads(out.read_text())["folders"]["plain"]
    flicker = [v["temporal_flickering"] for v in found["videos"]]
    assert len(flicker) == 6 and all(0.9 < x < 1 for x in flicker)
    assert set(found["categories"]) == {"animal", "food", "all"}
    assert found["categories"]["all"]["quality"] is None
    for d in DIMENSIONS:
        for file in d.files:
            assert str(tmp_path / "cache" / file) in said
    assert "as published" in said and "Table 6" in said


def test_features_beside_the_videos_give_every_score_but_imaging(command, prepared):
    folder, random = prepared / "features", np.random.default_rng(0)
    folder.mkdir()
    save_file({"weight": random.normal(size=8), "bias": np.array([5.0])}, folder / "aesthetic.safetensors")
    for video in prepared.glob("*.mp4"):
        made = {name: random.normal(size=(5, 8)) + 3 for name in ("dino", "clip_b32", "clip_l14")}
        made["flow"] = np.full((4, 2, 16, 16), 2.0)
        made["interpolated"] = frames()
        save_file(made, folder / f"{video.stem}.safetensors")
    _, out, _ = command("vbench", "score", prepared, "--json")
    scores = json.loads(out)["folders"]["plain"]["categories"]["animal"]["scores"]
    assert set(scores) == set(BY_NAME) - {"imaging_quality"}
    assert scores["dynamic_degree"] == 1.0
    assert scores["subject_consistency"] != scores["background_consistency"]


def test_features_of_another_shape_are_named(command, prepared):
    (prepared / "features").mkdir()
    save_file({"dino": np.ones((1, 4))}, prepared / "features" / "a cat-0.safetensors")
    code, _, err = command("vbench", "score", prepared)
    assert code == 2 and "a cat-0.safetensors: 1 frames have no neighbours" in err


FAKE = {
    "torch": "def device(name): return name\n",
    "vbench": """
import json, os
class VBench:
    def __init__(self, device, full, out):
        self.out, self.device = out, device
    def evaluate(self, videos_path, name, dimension_list, local, mode):
        assert (self.device, local, mode) == ("cpu", True, "custom_input")
        if os.environ.get("VBENCH_FAILS"):
            raise RuntimeError("no weights here")
        videos = [v for v in os.listdir(videos_path) if v.endswith(".mp4")]
        each = lambda d: 70.0 if d == "imaging_quality" else 0.9
        def of(d):
            return [{"video_path": os.path.join(videos_path, v), "video_results": each(d)} for v in videos]
        found = {d: [0.9, of(d)] for d in dimension_list}
        json.dump(found, open(os.path.join(self.out, name + "_eval_results.json"), "w"))
""",
}


@pytest.fixture
def fake_vbench(tmp_path, monkeypatch):
    """A Python whose vbench gives 0.9 to everything, and all weights there."""
    site = tmp_path / "site"
    site.mkdir()
    for name, source in FAKE.items():
        (site / f"{name}.py").write_text(source)
    for d in DIMENSIONS:
        for file in d.files:
            path = tmp_path / "cache" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir() if file.endswith("/") else path.touch()
    monkeypatch.setenv("PYTHONPATH", str(site))
    return sys.executable


def test_the_users_own_vbench_scores_in_a_process_of_its_own(command, prepared, fake_vbench, tmp_path):
    figure = tmp_path / "figure.png"
    _, out, _ = command("vbench", "score", prepared, "--vbench", fake_vbench, "--json", "--figure", figure)
    total = json.loads(out)["folders"]["plain"]["categories"]["all"]
    assert total["scores"] == pytest.approx({**dict.fromkeys(BY_NAME, 0.9), "imaging_quality": 0.7})
    assert total["as_in_table6"] - total["quality"] == pytest.approx(0.45 / 6.5)
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_only_dimensions_with_weights_are_asked_for(command, prepared, fake_vbench, tmp_path):
    (tmp_path / "cache" / "amt_model" / "amt-s.pth").unlink()
    _, said, _ = command("vbench", "score", prepared, "--vbench", fake_vbench)
    assert re.search(
        r"motion_smoothness: no score for 6 of 6 videos; needs .*amt-s\.pth$", said, re.MULTILINE
    )
    assert "subject_consistency:" not in said


def test_a_vbench_that_fails_says_what_it_said(command, prepared, fake_vbench, monkeypatch, tmp_path):
    monkeypatch.setenv("VBENCH_FAILS", "1")
    code, _, err = command("vbench", "score", prepared, "--vbench", fake_vbench)
    assert code == 1 and "vbench failed on subject_consistency" in err and "no weights here" in err
    code, _, err = command("vbench", "score", prepared, "--vbench", tmp_path / "none")
    assert code == 2 and "name the python of an environment with vbench" in err


def test_a_result_that_is_none_is_refused(tmp_path):
    path = tmp_path / "x_eval_results.json"
    path.write_text('{"subject_consistency": 3}')
    with pytest.raises(ConfigError, match="not a result of vbench"):
        external.read_results(path)


def test_consistency_weighs_each_video_by_its_frames(tmp_path):
    def video(frames, score):
        scores = {"subject_consistency": score, "temporal_flickering": score}
        return Video(tmp_path / "a-0.mp4", "a", "animal", frames, scores)

    found = means([video(2, 0.0), video(4, 1.0)])
    assert found == {"subject_consistency": 0.75, "temporal_flickering": 0.5}
    assert means([video(2, 0.5), Video(tmp_path, "b", "animal", 2)]) == {}
    assert list(by_category([video(2, 0.5)])) == ["animal"]


def test_the_table_has_a_row_for_each_category_and_folder():
    full = dict.fromkeys(BY_NAME, 0.9)
    rows = table({"plain": {"animal": full}, "lpl": {"animal": {"temporal_flickering": 0.8}}})
    assert [row[:2] for row in rows] == [["category", "videos of"], ["animal", "plain"], ["animal", "lpl"]]
    assert rows[2][4] == "0.8000" and rows[2][-2:] == ["-", "-"]
    assert float(rows[1][-2]) < float(rows[1][-1])


#: Table 6 of the paper: subject, background, flicker, smoothness, dynamic, aesthetic, imaging, quality score.
TABLE_6 = """
    97 98 99 99 15 51 56 79   95 97 99 99 28 48 55 79   99 98 99 99 05 53 60 78   98 98 99 99 12 49 56 78
    97 97 99 99 26 52 60 81   95 97 99 99 38 48 53 81   96 97 99 99 38 48 57 81   96 96 99 99 43 48 55 82
    97 97 99 99 23 45 56 79   96 97 99 99 25 45 53 78   98 98 99 99 15 50 58 79   97 98 99 99 16 46 55 78
    98 98 99 99 10 50 50 77   97 98 99 99 17 48 47 77   97 97 99 99 37 48 54 81   94 96 98 99 44 47 49 80
"""


def test_every_row_of_the_papers_table_is_reproduced_and_few_by_the_published_score():
    numbers = [int(n) / 100 for n in TABLE_6.split()]
    rows = [numbers[i : i + 8] for i in range(0, len(numbers), 8)]
    assert len(rows) == 16
    published, far = 0, 0.0
    for *scores, total in rows:
        named = {d.name: x for d, x in zip(DIMENSIONS, scores, strict=True)}
        # Seven scores rounded to 0.01 move the total by up to a hundredth; the total itself is rounded too.
        assert abs(quality_as_in_table(named) - total) < 0.0125
        published += round(quality(named), 2) == total
        far = max(far, total - quality(named))
    assert published < 8 and far == pytest.approx(0.037, abs=1e-3)


def test_no_prompt_is_in_the_package():
    package = Path(cli_run.__file__).parent
    assert {p.suffix for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts} <= {
        ".py",
        ".typed",
    }
