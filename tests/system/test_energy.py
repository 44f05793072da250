"""Energy where the system tells: counters that wrap, that fail, that are not there."""

import sys
from types import SimpleNamespace

import pytest

from blockstream.system.energy import EnergyMeter, gpus, zones


@pytest.fixture
def powercap(tmp_path):
    """A powercap folder: two packages, one with cores and memory, a platform, and what is no RAPL."""

    def write(name, kind, at):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "name").write_text(f"{kind}\n")
        (tmp_path / name / "energy_uj").write_text(f"{at}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("1000000000\n")

    for name, kind in (
        ("intel-rapl:0", "package-0"),
        ("intel-rapl:0:0", "core"),
        ("intel-rapl:0:1", "dram"),
        ("intel-rapl:1", "package-1"),
        ("intel-rapl:2", "psys"),
    ):
        write(name, kind, 900_000_000)
    (tmp_path / "dtpm").mkdir()
    return SimpleNamespace(root=tmp_path, write=write)


def test_packages_and_memory_are_counted_and_what_is_in_them_is_not_counted_twice(powercap):
    assert [zone.name for zone in zones(powercap.root)] == ["package-0 (0)", "dram (0:1)", "package-1 (1)"]


def test_a_run_takes_what_its_counters_grew_by_over_a_wrap(powercap):
    now = [0.0]
    meter = EnergyMeter(zones(powercap.root), clock=lambda: now[0])
    powercap.write("intel-rapl:0", "package-0", 950_000_000)
    now[0] = 30.0
    meter.segment_executed()
    now[0] = 60.0
    powercap.write("intel-rapl:1", "package-1", 980_000_000)
    meter.segment_executed()
    now[0] = 100.0
    powercap.write("intel-rapl:1", "package-1", 30_000_000)
    found = meter.account()
    assert found["by_source"] == {"package-0 (0)": 50.0, "dram (0:1)": 0.0, "package-1 (1)": 130.0}
    assert (found["joules"], found["watts"]) == (180.0, 1.8)


def test_a_counter_that_cannot_be_read_any_more_is_left_out(powercap):
    meter = EnergyMeter(zones(powercap.root))
    (powercap.root / "intel-rapl:0" / "energy_uj").write_text("what?")
    assert "package-0 (0)" not in meter.account()["by_source"]


def test_where_nothing_tells_nothing_is_said(tmp_path):
    assert zones(tmp_path / "nowhere") == []
    meter = EnergyMeter([])
    assert not meter.measures and meter.account() is None


class Nvml(SimpleNamespace):
    """Two GPUs, the second of which does not tell."""

    class NVMLError(Exception):
        pass

    at = 5_000

    def nvmlInit(self): ...

    def nvmlDeviceGetCount(self):
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetName(self, handle):
        return b"H100"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if handle:
            raise self.NVMLError("Not Supported")
        return self.at


def test_gpus_are_told_by_nvml(monkeypatch):
    nvml = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    meter = EnergyMeter(gpus())
    nvml.at += 2_500
    assert meter.account()["by_source"] == {"H100 (0)": 2.5}


def test_without_nvml_or_a_driver_no_gpu_tells(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpus() == []

    class NoDriver(Nvml):
        def nvmlInit(self):
            raise self.NVMLError("Driver Not Loaded")

    monkeypatch.setitem(sys.modules, "pynvml", NoDriver())
    assert gpus() == []
