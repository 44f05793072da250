"""`doctor` says what limits a run here."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from email.message import Message
from importlib import metadata

import pytest

from blockstream.cli import doctor
from blockstream.cli.extras import missing_extras, what_to_add
from blockstream.cli.hints import hints
from blockstream.errors import PluginError
from tests.support.fake_cuda import fake_cuda

DISK = {
    "path": ".",
    "file_system": {"fstype": "ext4", "source": "/dev/vda", "point": "/", "kind": "local"},
    "direct": {"bytes_per_s": 1.5e9, "request_nbytes": 4 << 20, "depth": 2},
    "buffered": {"bytes_per_s": 0.6e9, "request_nbytes": 1 << 20, "depth": 1},
    "direct_refused": None,
    "notes": ["written just now"],
}
LIMIT = {"source": "memory.max", "used_nbytes": 1 << 30, "limit_nbytes": 4 << 30}
FACTS = {
    "system": {"platform": "Linux", "python": "3.11"},
    "memory": {"nbytes": 3 << 30, "source": "memory.max", "limits": [LIMIT]},
    "held": {"nbytes": 5 << 20},
    "cpu": {"threads": 2, "source": "CPU quota"},
    "disk": DISK,
    "versions": {"torch": "2.6", "av": None},
    "devices": [{"kind": "cpu", "name": "a processor"}],
    "missing": {"report": ["matplotlib>=3.8"]},
}


def test_the_facts_of_this_machine_as_json(command, monkeypatch):
    code, out, err = command("doctor", "--json", "--no-disk")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert facts["disk"] is None and facts["memory"]["nbytes"] > 0 and facts["cpu"]["threads"] >= 1
    assert facts["devices"][0]["kind"] == "cpu"
    assert {"schema", "system", "held", "versions", "missing"} <= set(facts)


def test_the_disk_of_the_path_is_measured_direct_and_buffered(command, monkeypatch, tmp_path):
    asked = []

    def measured(path):
        asked.append(path)
        return type("Speed", (), {"as_dict": lambda self: DISK})()

    monkeypatch.setattr("blockstream.system.machine.disk", measured)
    code, out, err = command("doctor", str(tmp_path))
    assert (code, asked) == (0, [str(tmp_path)])
    assert "direct   1.50 GB/s" in out and "buffered 0.60 GB/s" in out
    assert "about three seconds" in err


def test_a_path_that_is_not_there_is_wrong_usage(command, tmp_path):
    code, out, err = command("doctor", str(tmp_path / "nowhere"), "--json")
    assert (code, out) == (2, "")
    assert "nowhere" in err


def test_people_read_every_fact():
    text = "\n".join(f"{title}: {line}" for title, line in doctor.lines_of(FACTS))
    for fact in (
        "memory: 3.0 GiB free under memory.max",
        "memory.max: 1.0 GiB used of 4.0 GiB",
        "processors: 2 to compute with: CPU quota",
        "device: cpu: a processor",
        "1.50 GB/s, 2 reader threads, requests of 4.0 MiB",
        "written just now",
        "versions: torch 2.6",
        "missing: matplotlib>=3.8: pip install 'blockstream-engine[report]'",
    ):
        assert fact in text
    assert "av" not in text


def described(monkeypatch, *required: str, versions: dict[str, str]):
    message = Message()
    for extra in ("movd", "report", "dev"):
        message["Provides-Extra"] = extra
    for requirement in required:
        message["Requires-Dist"] = requirement

    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "metadata", lambda name: message)
    monkeypatch.setattr(metadata, "version", version)


def test_an_extra_lacks_what_is_absent_or_too_old(monkeypatch):
    described(
        monkeypatch,
        "numpy>=1",
        "av>=14; extra == 'movd'",
        "pillow>=10; extra == 'movd'",
        "ftfy; extra == 'movd'",
        "winonly; extra == 'movd' and sys_platform == 'nowhere'",
        "matplotlib; extra == 'report'",
        "mypy; extra == 'dev'",
        versions={"av": "15.0", "pillow": "9.5", "matplotlib": "3.9"},
    )
    assert missing_extras() == {"movd": ["pillow>=10", "ftfy"]}


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("NVIDIA H100, 81559 MiB\nNVIDIA H100, 81559 MiB\n", ["NVIDIA H100, 81559 MiB"] * 2),
        (subprocess.TimeoutExpired("nvidia-smi", 10), ["nvidia-smi failed: "]),
        ("", []),
    ],
)
def test_devices_are_listed_without_torch(monkeypatch, output, expected):
    def smi(*args, **options):
        if isinstance(output, Exception):
            raise output
        return subprocess.CompletedProcess(args, 0, stdout=output)

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(doctor.subprocess, "run", smi)
    cpu, *others = doctor.devices()
    assert cpu["kind"] == "cpu" and cpu["name"]
    assert len(others) == len(expected)
    for device, name in zip(others, expected, strict=True):
        assert device["kind"] == "cuda" and device["name"].startswith(name)


def test_what_is_not_installed_is_said_in_one_line_with_what_adds_it(monkeypatch):
    names = [f"{name}; extra == 'movd'" for name in ("av>=14", "pillow>=10", "ftfy")]
    described(monkeypatch, *names, "matplotlib; extra == 'report'", versions={"matplotlib": "3.9"})
    add = "av, pillow, ftfy are not installed: pip install 'blockstream-engine[movd]'"
    for module in ("ftfy", "PIL.Image", "av"):
        absent = ModuleNotFoundError(f"No module named {module!r}", name=module)
        assert what_to_add(absent) == add
        blamed = PluginError("plugin 'movd', build() of pipeline 'movd': ...")
        blamed.__cause__ = absent
        assert what_to_add(blamed) == add
    assert what_to_add(ModuleNotFoundError("No module named 'own'", name="own")) is None
    assert what_to_add(ValueError("no module")) is None


def test_hints_say_what_to_do_about_what_was_found(monkeypatch, tmp_path):
    import resource

    sound = copy.deepcopy(FACTS)
    sound |= {"missing": {}, "devices": [{"kind": "cpu", "name": "x"}]}
    sound["versions"] = {"torch": "2.9.0+cpu"}
    sound["memory"]["nbytes"] = 8 << 30
    sound["disk"] = None
    monkeypatch.setenv("BLOCKSTREAM_CACHE", str(tmp_path))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    assert list(hints(sound)) == []
    poor = {
        **sound,
        "missing": {"movd": ["av>=14"]},
        "devices": [{"kind": "cuda", "name": "x"}],
        "memory": {**sound["memory"], "nbytes": 1 << 20},
    }
    monkeypatch.setattr(resource, "getrlimit", lambda _: (40, 4096))
    said = "\n".join(hints(poor))
    for words in (
        "1.0 MiB of memory are free",
        "cannot use the GPU",
        "only 40 files may be open at once: ulimit -n 256",
        "av>=14 missing: pip install 'blockstream-engine[movd]'",
    ):
        assert words in said


def test_a_machine_without_a_gpu_is_said_to_have_none(command, monkeypatch):
    monkeypatch.setattr(doctor, "devices", lambda: [{"kind": "cpu", "name": "a processor"}])
    code, out, _ = command("doctor", "--no-disk")
    assert code == 0 and "no GPU to compute with" in out
    assert json.loads(command("doctor", "--no-disk", "--json")[1])["gpu"] is None


@pytest.mark.parametrize("refuses", [None, "no more"])
def test_the_link_and_the_memory_of_a_gpu_are_measured(command, monkeypatch, refuses):
    from blockstream.device import measure

    device = fake_cuda(monkeypatch, nbytes=8 << 30, refuses=refuses)
    monkeypatch.setattr(measure.device_facts, "__defaults__", (1 << 20,))
    monkeypatch.setattr(doctor, "devices", lambda: [{"kind": "cuda", "name": "a card"}])
    found = json.loads(command("doctor", "--no-disk", "--json")[1])["gpu"]
    assert found["name"] == "fake" and found["budget"]["nbytes"] == (8 << 30) * 8 // 10
    assert found["link"]["refused"] == refuses and found["link"]["pageable_bytes_per_s"] > 0
    assert not device.registered
    out = command("doctor", "--no-disk")[1]
    assert "8.0 GiB free; 0 B taken outside" in out
    assert f"registered memory {'refused (no more)' if refuses else ''}" in out


def test_a_gpu_that_cannot_be_used_is_said_with_what_torch_says(command, monkeypatch):
    monkeypatch.setattr("blockstream.device.choose.devices_here", lambda: 0)
    monkeypatch.setattr(doctor, "devices", lambda: [{"kind": "cuda", "name": "a card"}])
    assert "it cannot be used: ConfigError: device: cuda" in command("doctor", "--no-disk")[1]
