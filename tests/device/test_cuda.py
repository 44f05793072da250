"""The CUDA device beside a stand-in for `torch.cuda`: what is asked of which stream, and what is refused."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

import blockstream.device.cuda as module
from blockstream.device.choose import choose_device
from blockstream.device.cuda import CudaDevice
from blockstream.errors import BudgetError, ConfigError

GIB = 1 << 30


class Event:
    def __init__(self, enable_timing=False):
        self.stream, self.over, self.timed = None, False, enable_timing

    def elapsed_time(self, other):
        assert self.timed and other.timed
        return 1500.0

    def record(self, stream):
        self.stream = stream

    def query(self):
        return self.over

    def synchronize(self):
        self.over = True


class Stream:
    def __init__(self, name):
        self.name, self.waits = name, []

    def wait_event(self, event):
        self.waits.append(event)


class Cuda:
    """As much of `torch.cuda` as the device uses; `code` is what registering returns."""

    Event = Event

    def __init__(self, code=0):
        self.code, self.calls, self.free, self.reserved = code, [], 60 * GIB, 0
        self.compute, self.now, self.streams = Stream("compute"), None, []

    def is_available(self):
        return True

    def device_count(self):
        return 1

    def is_initialized(self):
        return True

    def get_device_name(self, index):
        return "Stand-in"

    def device(self, where):
        return nullcontext()

    def Stream(self, where):
        self.streams.append(Stream("copies"))
        return self.streams[-1]

    def current_stream(self, where):
        return self.compute

    @contextmanager
    def stream(self, stream):
        self.now = stream
        yield
        self.now = None

    def cudart(self):
        def register(address, nbytes, flags):
            self.calls.append(("register", address, nbytes, flags))
            return self.code

        def unregister(address):
            self.calls.append(("unregister", address))
            return 0

        return SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)

    def mem_get_info(self, where):
        return self.free, 80 * GIB

    def memory_reserved(self, where):
        return self.reserved

    max_memory_reserved = memory_reserved

    def set_per_process_memory_fraction(self, fraction, where):
        self.calls.append(("fraction", fraction))

    def synchronize(self, where):
        self.calls.append(("synchronize",))

    def reset_peak_memory_stats(self, where):
        pass


@pytest.fixture(name="made")
def _made(monkeypatch):
    def make(**options):
        cuda = Cuda(**options)
        monkeypatch.setattr(module, "cuda", cuda)
        monkeypatch.setattr(module, "warm_up", lambda where: None)
        return cuda, CudaDevice(0)

    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "as it was")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    return make


def test_copies_are_issued_on_their_own_stream_and_fences_join_the_two(made):
    cuda, device = made()
    to, source = torch.zeros(4, dtype=torch.uint8), torch.arange(4, dtype=torch.uint8)
    seen = []
    copy = torch.Tensor.copy_

    class Watched(torch.Tensor):
        def copy_(self, other, non_blocking=False):
            seen.append((cuda.now.name, non_blocking))
            return copy(self, other)

    ready = device.copy([(to.as_subclass(Watched), source)])
    assert seen == [("copies", True)] and torch.equal(to, source)
    assert ready.event.stream is cuda.streams[0] and not ready.is_over()
    device.compute_waits(ready)
    assert cuda.compute.waits == [ready.event]
    done = device.computed()
    assert done.event.stream is cuda.compute
    device.copies_wait(done)
    assert cuda.streams[0].waits == [done.event]
    ready.wait()
    assert ready.is_over()


def test_opening_pins_what_could_change_bits(made):
    made()
    assert torch.backends.cudnn.benchmark is False
    assert module.os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_memory_is_registered_once_by_its_address_and_given_back(made):
    cuda, device = made()
    assert device.register(4096, 1 << 20) is None
    device.unregister(4096)
    assert [c for c in cuda.calls if c[0].endswith("register")] == [
        ("register", 4096, 1 << 20, 0), ("unregister", 4096),
    ]  # fmt: skip


def test_a_refused_registration_says_so_and_its_error_is_raised_by_no_other(made, monkeypatch):
    _, device = made(code=2)
    raised = []

    def zeros(*args, **options):
        raised.append(options["device"])
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "zeros", zeros)
    assert device.register(4096, 1 << 20) == "cudaHostRegister refused 1 MiB with error 2"
    assert raised and all(d == device.where for d in raised)


def test_what_the_process_holds_beside_the_allocator_is_what_is_used_and_not_reserved(made):
    cuda, device = made()
    cuda.reserved = 19 * GIB
    now = device.memory()
    assert (now.outside_nbytes, now.others_nbytes) == (1 * GIB, None)
    device.limit(40 * GIB)
    assert ("fraction", 0.5) in cuda.calls


def test_memory_that_the_device_has_not_is_refused_by_name(made, monkeypatch):
    _, device = made()

    def empty(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(BudgetError, match="Stand-in could not give 1024 MiB for weights: 61440 of 81920 MiB"):
        device.empty(GIB)


def test_a_device_that_is_not_there_is_refused_by_number(made):
    made()
    with pytest.raises(ConfigError, match="cuda:1: torch has 1 here"):
        choose_device("cuda:1")


def test_a_stamp_tells_the_moment_beside_a_known_one_which_later_ones_replace(made):
    cuda, device = made()
    known, at_s = device.base
    stamp = device.stamp("copies")
    assert stamp.event.timed and stamp.event.stream is cuda.streams[0]
    assert stamp.at_s() == at_s + 1.5 and device.base == (known, at_s)
    assert device.stamp("compute").event.stream is cuda.compute
    Event.elapsed_time, before = (lambda self, other: 61_000.0), Event.elapsed_time
    try:
        assert stamp.at_s() == at_s + 61 and device.base == (stamp.event, at_s + 61)
    finally:
        Event.elapsed_time = before
