"""Near the least budget nothing is left for what the heap keeps of freed activations."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from blockstream.checkpoint.write.synthesis import synthesise
from tests.support.greedy import Model

#: Two stages of it in the least budget, or so many MiB more, where the heap keeps all that is freed.
PROGRAM = """
import ctypes, sys, torch, blockstream
from blockstream.errors import BudgetError
from tests.support.greedy import Model

M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 32 << 20)
ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, 1 << 30)
x = torch.ones(4, 512)

def run(budget):
    with torch.no_grad(), blockstream.Session(budget=budget) as s:
        for stage in [s.stage(n, Model, sys.argv[1], passes=1, example_inputs=(x,)) for n in ("one", "two")]:
            stage(x)
        return s.report()["budget"]

try:
    run(1 << 20)
except BudgetError as error:
    least = int(str(error).rpartition("the least is ")[2].removesuffix(" MiB"))
print(run((least + int(sys.argv[2])) << 20))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="sets the C library's heap as glibc has it")
@pytest.mark.parametrize("more_mib", [0, 40])
def test_the_budget_holds_where_the_heap_keeps_what_is_freed(tmp_path, more_mib):
    with torch.device("meta"):
        spec = {name: ("F32", tuple(t.shape)) for name, t in Model().state_dict().items()}
    folder = synthesise(spec, tmp_path / "c").root
    command = [sys.executable, "-c", PROGRAM, str(folder), str(more_mib)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert "'held': True" in done.stdout, done.stdout
