"""Example inputs that do not run: the plan says that it is a guess, and why, wherever it is shown."""

import logging

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import blockstream

WRONG = {
    "shape": torch.ones(2, 17),
    "keyword": {"y": torch.ones(2, 16)},
    "nothing": (),
}


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture(name="folder")
def _folder(tmp_path):
    save_file(Tower().state_dict(), tmp_path / "model.safetensors")
    return tmp_path


def opened(folder, inputs):
    session = blockstream.open(arena="1MiB")
    session.stage("tower", Tower, folder, example_inputs=inputs)
    return session


@pytest.mark.parametrize("wrong", WRONG)
def test_inputs_that_do_not_run_are_said_to_make_the_plan_a_guess(folder, wrong, caplog):
    with opened(folder, WRONG[wrong]) as session:
        session.draft()
        (source,) = session.costs_from.values()
        assert "its example inputs do not run (" in source
        assert "Error" in source
    (said,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert said.startswith("stage 'tower' is planned by a guess until its first pass: its example inputs")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.long])
def test_a_plan_of_inputs_of_any_dtype_starts_from_operations(folder, dtype, caplog):
    with opened(folder, (torch.ones(2, 16, dtype=dtype),)) as session:
        session.draft()
        assert session.costs_from["tower"].startswith("operations")
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
