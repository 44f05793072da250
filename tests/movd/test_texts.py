"""Prompts' embeddings: found again, made again when damaged, bounded, and never all in memory."""

import gc
import json
import logging
import os
import weakref

import pytest
import torch
from safetensors.torch import load

from blockstream.run import runner
from blockstream.run.files import Files
from movd import opensora
from movd.texts import TextCache, Texts
from tests.support import movd_tiny as tiny
from tests.support.interrupted import Passes

MANY = 12
Y = tiny.noise(1, 1, 6, 8)
MASK = torch.tensor([[1, 1, 1, 0, 0, 0]])


def entries(cache):
    return sorted((cache / "movd" / "text").glob("*.safetensors"))


def passes_of(config, out):
    passes = Passes()
    runner.run(config, out, observers=[passes])
    return passes.of


A, B, C, D = (letter * 32 for letter in "abcd")
ENTRY = {"y": Y[0, 0, :3].contiguous(), "length": 6}


def own_files(folder):
    files = Files(folder)
    folder.mkdir(exist_ok=True)
    files.begin({}, {})
    return files


def texts_of(captions, about, files, cache):
    texts = Texts(captions, about, files, cache)
    files.declare([], texts.names)
    return texts


@pytest.fixture(name="off")
def _off(tmp_path):
    return TextCache(tmp_path / "off", 0)


def test_what_comes_back_is_what_was_put_and_zero_where_nothing_attends(tmp_path, off):
    texts = texts_of(["a"], {}, own_files(tmp_path), off)
    texts.put("a", Y, MASK)
    y, mask = texts.get("a")
    assert torch.equal(mask, MASK)
    assert torch.equal(y[:, :, :3], Y[:, :, :3])
    assert not y[:, :, 3:].any()
    assert y.shape == Y.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_embedding_keeps_its_dtype(tmp_path, off, dtype):
    texts = texts_of(["a"], {}, own_files(tmp_path), off)
    texts.put("a", Y.to(dtype), torch.ones(1, 6, dtype=torch.int64))
    assert torch.equal(texts.get("a")[0], Y.to(dtype))


def damage_truncated(path):
    os.truncate(path, 80)


def damage_flipped(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def damage_length(path):
    data = path.read_bytes()
    assert rb"\"length\": 6" in data
    path.write_bytes(data.replace(rb"\"length\": 6", rb"\"length\": 9"))


def damage_emptied(path):
    path.write_bytes(b"")


DAMAGES = [damage_truncated, damage_flipped, damage_length, damage_emptied]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_as_if_it_were_not_there(tmp_path, damage, caplog):
    cache = TextCache(tmp_path, 1 << 20)
    cache.put(A, ENTRY)
    damage(cache.path(A))
    assert cache.get(A) is None
    assert "made again" in caplog.text
    cache.put(A, ENTRY)
    assert cache.get(A) is not None


def test_an_entry_under_another_key_is_not_taken(tmp_path):
    cache = TextCache(tmp_path, 1 << 20)
    cache.put(A, ENTRY)
    cache.path(A).rename(cache.path(B))
    assert cache.get(B) is None


def test_the_cache_drops_what_was_used_longest_ago(tmp_path):
    cache = TextCache(tmp_path, 1 << 20)
    for n, key in enumerate([A, B, C]):
        cache.put(key, ENTRY)
        os.utime(cache.path(key), (n, n))
    size = cache.path(A).stat().st_size
    assert cache.get(A) is not None  # used now
    TextCache(tmp_path, 3 * size).put(D, ENTRY)
    assert [key for key in (A, B, C, D) if cache.path(key).exists()] == [A, C, D]


def test_the_cache_clears_what_a_kill_left(tmp_path):
    left = tmp_path / f".{B}.safetensors.123"
    left.write_bytes(bytes(5000))
    os.utime(left, (1, 1))
    TextCache(tmp_path, 1000).put(A, ENTRY)
    assert [p.name for p in tmp_path.iterdir()] == [f"{A}.safetensors"]


def test_the_cache_removes_none_but_its_own_files(tmp_path):
    (tmp_path / "mine").write_bytes(bytes(5000))
    folder = tmp_path / "cache"
    folder.mkdir()
    mine = [folder / "model.safetensors", folder / ".keep.1", folder / f"{C}.safetensors.bak"]
    for path in mine:
        path.write_bytes(bytes(5000))
        os.utime(path, (1, 1))
    (folder / f"{B}.safetensors").symlink_to(tmp_path / "mine")
    TextCache(folder, 10).put(A, ENTRY)
    assert all(path.exists() for path in mine)
    assert (tmp_path / "mine").stat().st_size == 5000
    assert (folder / f"{B}.safetensors").is_symlink()


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    cache = TextCache(tmp_path / "file", 1000)
    with caplog.at_level(logging.INFO):
        cache.put(A, ENTRY)
        assert cache.get(A) is None
    assert "cannot be written" in caplog.text


def test_a_cache_of_no_size_holds_nothing(tmp_path):
    TextCache(tmp_path / "cache", 1 << 20).put(A, ENTRY)
    off = TextCache(tmp_path / "cache", 0)
    assert off.get(A) is None
    off.put(B, ENTRY)
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize("changed", ["weights", "tokenizer", "dtype", "threads"])
def test_everything_an_embedding_follows_from_is_part_of_its_key(tmp_path, changed):
    own, cache = own_files(tmp_path / "own"), TextCache(tmp_path / "cache", 1 << 20)
    about = {"weights": "w", "tokenizer": "t", "dtype": None, "threads": 1}
    texts_of(["a"], about, own, cache).put("a", Y, MASK)
    assert texts_of(["a", "b"], about, own, cache).missing(["a", "b", "b"]) == ["b"]
    other = {**about, changed: "other"}
    assert texts_of(["a"], other, own, cache).missing(["a"]) == ["a"]


def test_a_run_does_not_need_the_cache_once_it_has_begun(tmp_path):
    cache = TextCache(tmp_path / "cache", 1 << 20)
    texts_of(["a"], {}, own_files(tmp_path / "earlier"), cache).put("a", Y, MASK)
    texts = texts_of(["a"], {}, own_files(tmp_path / "own"), cache)
    assert texts.missing(["a"]) == []
    texts.collect(["a"])
    for path in cache.folder.iterdir():
        path.unlink()
    assert torch.equal(texts.get("a")[1], MASK)


# -- in runs ---------------------------------------------------------------------------------------


def test_a_prompt_seen_before_needs_no_t5_and_gives_the_same_bits(config, tmp_path, own_cache):
    first = passes_of(config(prompts=["a red star", "a blue circle", "a red star"]), tmp_path / "a")
    assert first["t5"] == 2
    assert len(entries(own_cache)) == 2
    again = passes_of(config(prompts=["a blue circle"]), tmp_path / "b")
    assert set(again) == {"dit", "vae"}
    latents = [tmp_path / name / "latents.safetensors" for name in ("a/0001", "b")]
    assert latents[0].read_bytes() == latents[1].read_bytes()


def test_a_plan_of_known_prompts_has_no_t5_and_writes_nothing(config, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    assert [s["name"] for s in runner.plan(config())["stages"]] == ["t5", "dit", "vae"]
    runner.run(config(), tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    assert [s["name"] for s in runner.plan(config())["stages"]] == ["dit", "vae"]
    assert sorted(tmp_path.rglob("*")) == before
    assert "damaged" not in caplog.text


def test_a_damaged_entry_is_made_again_by_the_next_run(config, tmp_path, own_cache):
    runner.run(config(), tmp_path / "a")
    (entry,) = entries(own_cache)
    good = load(entry.read_bytes())
    damage_flipped(entry)
    assert passes_of(config(), tmp_path / "b")["t5"] == 1
    again = load(entry.read_bytes())
    assert again.keys() == good.keys() and all(torch.equal(again[k], good[k]) for k in good)


@pytest.mark.parametrize("off", ["off", 0])
def test_without_a_cache_t5_runs_each_time(config, tmp_path, own_cache, off):
    for name in ("a", "b"):
        assert passes_of(config(cache=off), tmp_path / name)["t5"] == 1
    assert not entries(own_cache)


def test_other_weights_are_not_answered_from_the_cache(config, models, tmp_path, own_cache):
    from tests.support.movd_models import write_t5

    runner.run(config(), tmp_path / "a")
    write_t5(tmp_path / "t5", num_heads=4)
    assert passes_of(config(t5={"path": str(tmp_path / "t5")}), tmp_path / "b")["t5"] == 1


def test_many_prompts_go_stage_by_stage_and_one_embedding_is_held_at_a_time(config, tmp_path, monkeypatch):
    held, most = weakref.WeakSet(), []
    embed = opensora.embed

    def watched(*args):
        y, mask = embed(*args)
        held.add(y)
        gc.collect()
        most.append(len(held))
        return y, mask

    monkeypatch.setattr(opensora, "embed", watched)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\ufeff" + "\n".join(f"a red star number {n}" for n in range(MANY)))
    order = []

    class Stages(Passes):
        from blockstream.plugins import hookimpl

        @hookimpl
        def stage_started(self, stage):
            order.append(stage.name)

    passes = Stages()
    out = tmp_path / "out"
    asked = config(prompts=str(prompts), steps=1, cache="off")
    first = asked.pipeline.options.prompts[0]
    assert first == "a red star number 0"  # without the mark of the file's beginning
    report = runner.run(asked, out, observers=[passes])
    assert order == ["t5", "dit", "vae"]
    assert passes.of == dict.fromkeys(order, MANY)
    assert len(report["output"]["files"]) == MANY
    assert (out / f"{MANY - 1:04d}" / "video.mp4").stat().st_size > 0
    assert len(most) == MANY
    assert max(most) <= 2  # the one just made, and the one before it until its name is given anew
    assert json.loads((out / "report.json").read_text())["output"]["prompts"][-1].endswith(f" {MANY - 1}")
