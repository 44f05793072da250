"""One CUDA device: a stream of copies beside the stream that computes, registered host memory, its memory."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from blockstream.engine.store import Fence
from blockstream.errors import BudgetError, ConfigError

from .protocol import DeviceMemory, Speeds

#: Untyped in torch.
cuda: Any = torch.cuda
#: What cuBLAS's workspaces have to be for equal bits in every run: pinned, as they are numerics.
WORKSPACE_CONFIG = ":4096:8"


class CudaFence:
    """An event of a stream. A `Fence`."""

    def __init__(self, stream: Any) -> None:
        self.event = cuda.Event()
        self.event.record(stream)

    def is_over(self) -> bool:
        """Return whether the stream has passed it."""
        return bool(self.event.query())

    def wait(self) -> None:
        """Wait for it on the host."""
        self.event.synchronize()


class CudaStamp(CudaFence):
    """An event that was timed, beside one whose moment is known. A `Stamp`."""

    def __init__(self, stream: Any, device: CudaDevice) -> None:
        self.event = cuda.Event(enable_timing=True)
        self.event.record(stream)
        self._device = device

    def at_s(self) -> float:
        """Return the moment the stream passed it."""
        base, base_s = self._device.base
        at_s = base_s + float(base.elapsed_time(self.event)) / 1e3
        if at_s - base_s > BASE_S:  # elapsed times are of single precision
            self._device.base = self.event, at_s
        return at_s


#: For so long an event whose moment is known serves for those after it.
BASE_S = 60.0
#: A first forward loads kernels, each into host memory as well: 119 MB were seen on an H100.
HOST_NBYTES = 160 << 20


class CudaDevice:
    """A CUDA device. A `blockstream.device.protocol.Device`.

    Opening it makes torch's context and pins what free memory or timings could change of the numerics:
    cuDNN's benchmark is off, cuBLAS's workspace has its size, and one stream computes.
    """

    def __init__(self, index: int = 0) -> None:
        if not cuda.is_available():
            raise ConfigError("device cuda: torch finds no CUDA device here; write cpu, or auto")
        if not 0 <= index < cuda.device_count():
            raise ConfigError(f"device cuda:{index}: there are {cuda.device_count()}, from 0 on")
        self._others = None if cuda.is_initialized() else _used_by_all(index)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACE_CONFIG)
        torch.backends.cudnn.benchmark = False
        self.where = torch.device("cuda", index)
        self.host_nbytes = HOST_NBYTES
        self.speeds = Speeds(50e9, 400e12)
        self.name: str = cuda.get_device_name(index)
        with cuda.device(self.where):
            self._copies = cuda.Stream(self.where)
            warm_up(self.where)
            cuda.synchronize(self.where)
            known = cuda.Event(enable_timing=True)
            known.record(self._copies)
            known.synchronize()
            #: An event, and its moment as `time.perf_counter` has it.
            self.base: tuple[Any, float] = known, time.perf_counter()
        cuda.reset_peak_memory_stats(self.where)

    def empty(self, nbytes: int) -> Tensor:
        """Return memory of torch's allocator; BudgetError where the device has not so much."""
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device=self.where)
        except torch.OutOfMemoryError as error:
            free, total = cuda.mem_get_info(self.where)
            raise BudgetError(
                f"{self.name} could not give {nbytes >> 20} MiB for weights: {free >> 20} of {total >> 20} "
                "MiB are free; name a smaller device_budget, or end what else runs on it"
            ) from error

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Fence:
        """Issue copies on the stream of copies."""
        with torch.no_grad(), cuda.stream(self._copies):
            for to, source in pairs:
                to.copy_(source, non_blocking=True)
            return CudaFence(self._copies)

    def copies_wait(self, fence: Fence) -> None:
        """Have the stream of copies wait."""
        assert isinstance(fence, CudaFence)
        self._copies.wait_event(fence.event)

    def compute_waits(self, fence: Fence) -> None:
        """Have the calling thread's stream wait."""
        assert isinstance(fence, CudaFence)
        cuda.current_stream(self.where).wait_event(fence.event)

    def computed(self) -> Fence:
        """Return an event of the calling thread's stream."""
        return CudaFence(cuda.current_stream(self.where))

    def stamp(self, queue: Literal["copies", "compute"]) -> CudaStamp:
        """Return a timed event of the stream of copies, or of the calling thread's."""
        stream = self._copies if queue == "copies" else cuda.current_stream(self.where)
        return CudaStamp(stream, self)

    def register(self, address: int, nbytes: int) -> str | None:
        """Register anonymous memory, touched before; what fails leaves no error for the next kernel."""
        with cuda.device(self.where):
            code = int(cuda.cudart().cudaHostRegister(address, nbytes, 0))
            if code == 0:
                return None
            self._clear_error()
            return f"cudaHostRegister refused {nbytes >> 20} MiB with error {code}"

    def unregister(self, address: int) -> None:
        """Undo a registration."""
        with cuda.device(self.where):
            code = int(cuda.cudart().cudaHostUnregister(address))
            if code != 0:
                self._clear_error()

    def memory(self) -> DeviceMemory:
        """Return what the device's memory holds now."""
        free, total = cuda.mem_get_info(self.where)
        reserved = cuda.memory_reserved(self.where)
        outside = total - free - reserved - (self._others or 0)
        return DeviceMemory(
            total,
            free,
            reserved,
            cuda.max_memory_reserved(self.where),
            max(0, outside),
            self._others,
        )

    def forget_peak(self) -> None:
        """Have the most that torch's allocator reserved count from now on."""
        cuda.reset_peak_memory_stats(self.where)

    def limit(self, nbytes: int) -> None:
        """Have torch's allocator refuse more: a backstop, what is planned stays below."""
        total = cuda.mem_get_info(self.where)[1]
        cuda.set_per_process_memory_fraction(min(1.0, nbytes / total), self.where)

    def synchronise(self) -> None:
        """Wait for both streams."""
        cuda.synchronize(self.where)

    def _clear_error(self) -> None:
        """Let the error that a call left be raised here, not by the kernel that comes next."""
        for _ in range(2):
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device=self.where)
                cuda.synchronize(self.where)


def count() -> int:
    """Return how many devices torch can use here."""
    return int(cuda.device_count()) if cuda.is_available() else 0


def warm_up(where: torch.device) -> None:
    """Multiply small matrices: what libraries take for themselves is taken before anything is planned."""
    for dtype in (torch.bfloat16, torch.float32):
        warm = torch.ones(64, 64, dtype=dtype, device=where)
        torch.nn.functional.linear(warm @ warm, warm, warm[0])


def _used_by_all(index: int) -> int | None:
    """Return what is used of a device before this process has a context on it; None where nobody says."""
    tool = shutil.which("nvidia-smi")
    if tool is None or os.environ.get("CUDA_VISIBLE_DEVICES"):  # numbered otherwise there
        return None
    query = [tool, f"--id={index}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        return int(said.split()[0]) << 20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
