"""`blockstream export coreml` and `blockstream verify coreml`."""

import json
import logging
import sys
import types

import pytest
import torch

from blockstream.cli.main import main
from blockstream.errors import ConfigError
from movd_coreml import tools
from movd_coreml import verify as verifying
from movd_coreml.compare import difference
from movd_coreml.int8 import dequantised
from movd_coreml.networks import Networks, What
from movd_coreml.segments import HIDDEN
from tests.support.coreml import need_coremltools

#: Exports take a while where other processes compute.
pytestmark = pytest.mark.timeout(900)


def test_without_coremltools_the_command_says_how_to_install_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tools, "available", lambda: False)
    tools.coremltools.cache_clear()
    try:
        code = main(["export", "coreml", "movd.yaml", "--out", str(tmp_path / "out")])
    finally:
        tools.coremltools.cache_clear()
    assert code == 2
    assert "pip install 'blockstream-engine[coreml]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_imports_neither_torch_nor_coremltools(capsys):
    for words in (["export", "coreml", "--help"], ["verify", "coreml", "--help"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "FRAMESxHEIGHTxWIDTH" in out and "--config" in out


def test_verify_prints_what_it_compared(exported, capsys):
    assert main(["verify", "coreml", str(exported.folder)]) == 0
    out = capsys.readouterr().out
    assert "dit.pair.00 f17x16x16_merged" in out and "vae-spatial in whole" in out
    assert "\nequal\n" in out and "that needs macOS" in out
    assert main(["verify", "coreml", str(exported.folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["schema"] == 1 and report["equal"] and not report["predicted"]


def test_verify_fails_where_something_differs(exported, capsys, monkeypatch):
    monkeypatch.setitem(verifying.TOLERANCES, "fp32", 1e-12)
    assert main(["verify", "coreml", str(exported.folder)]) == 1
    assert "DIFFERS" in capsys.readouterr().out


def test_verify_of_no_export_is_wrong_usage(tmp_path, capsys):
    assert main(["verify", "coreml", str(tmp_path)]) == 2
    assert "holds no finished Core ML export" in capsys.readouterr().err


def test_a_config_of_another_pipeline_is_refused():
    config = types.SimpleNamespace(pipeline=types.SimpleNamespace(options=None, ref="toy"))
    with pytest.raises(ConfigError, match="pipeline 'toy' has no Core ML segments"):
        Networks(config, What())


def test_on_macos_verify_compares_what_core_ml_predicts(exported, monkeypatch):
    """Core ML is a stand-in that multiplies by a factor: what is shown is that its result is judged."""
    asked = []

    class MLModel:
        def __init__(self, path, function_name=None, compute_units=None):
            asked.append((path, function_name))

        def predict(self, given):
            return {name: value * 1.5 for name, value in outputs.items()}

    ct = types.SimpleNamespace(
        models=types.SimpleNamespace(MLModel=MLModel), ComputeUnit=types.SimpleNamespace(CPU_ONLY=0)
    )
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(tools, "coremltools", lambda: ct)
    program = exported.segments["dit.pair.00"].program("17x16x16")
    (want,) = (torch.ones(t.shape) for t in program.outputs)
    outputs = {t.name: want.numpy() for t in program.outputs}
    check = object.__new__(verifying.Verification)
    check.made = exported
    values = {t.value: torch.zeros(t.shape) for t in program.inputs}
    assert check.predicted(program, values, (want,)) == pytest.approx(0.5)
    assert asked == [(str(exported.package_of(program)), "f17x16x16")]


def test_a_difference_is_measured_in_the_change_a_block_makes():
    before = torch.full((4,), 100.0)
    want, got = before + 1, before + 1.01
    assert difference(got, want, before) == pytest.approx(0.01 / 1.01, rel=0.01)
    assert difference(got, want, None) == pytest.approx(0.01 / 101, rel=0.01)
    assert difference(got[:3], want, before) == float("inf")


def test_scores_of_hidden_tokens_hide_no_difference():
    want = torch.tensor([HIDDEN, 1.0])
    assert difference(torch.tensor([HIDDEN, 1.1]), want, None) == pytest.approx(0.1, rel=0.01)
    assert difference(torch.tensor([0.0, 1.0]), want, None) == float("inf")


def test_values_that_are_no_numbers_differ():
    want = torch.ones(3)
    assert difference(torch.tensor([1.0, float("nan"), 1.0]), want, None) == float("inf")


def test_dequantised_weights_are_within_half_a_step_of_each_row():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    step = weight.abs().amax(1, keepdim=True) / 127
    held = dequantised(weight)
    assert ((held - weight).abs() <= 0.5001 * step).all()
    assert torch.equal(dequantised(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_quiet_holds_back_what_is_printed_and_keeps_errors(capsys):
    with tools.quiet() as errors:
        print("progress", file=sys.stderr)
        logging.getLogger("coremltools").warning("untested")
        logging.getLogger("coremltools").error("ERROR - converting 'x' op")
    assert errors == ["ERROR - converting 'x' op"]
    assert capsys.readouterr().err == ""


def test_coremltools_is_imported_quietly(capfd):
    need_coremltools()
    assert tools.coremltools().__version__.startswith("9.0")
    assert capfd.readouterr().err == ""
