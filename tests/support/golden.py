"""Readers of the official models' inputs and outputs, which lie beside the project when they are there."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "public"


class Golden:
    """One folder of golden data: meta, weights, inputs, outputs; `close` compares within its tolerance."""

    def __init__(self, name):
        folder = GOLDEN / name
        if not (folder / "meta.json").is_file():
            pytest.skip(f"the golden data ../shared/golden/public/{name} is not there")
        self.meta = json.loads((folder / "meta.json").read_text())
        self.inputs = load_file(folder / "inputs.safetensors")
        self.outputs = load_file(folder / "outputs.safetensors")
        weights = folder / "weights.safetensors"
        self.weights = load_file(weights) if weights.is_file() else None

    def given(self, case):
        prefix = case + "."
        return {k[len(prefix) :]: v for k, v in self.inputs.items() if k.startswith(prefix)}

    def expected(self, case):
        prefix = case + "."
        return {k[len(prefix) :]: v for k, v in self.outputs.items() if k.startswith(prefix)}

    def close(self, mine, golden, what=""):
        limits = self.meta["tolerance"]["float32"]
        torch.testing.assert_close(mine, golden, **limits, msg=lambda m: f"{what}: {m}")


@pytest.fixture(scope="module")
def golden(request):
    """The folder named by the module's FOLDER."""
    return Golden(request.module.FOLDER)


@pytest.fixture(scope="session")
def folder_of():
    return Golden
