"""The names users see: complete, and no torch before one of them needs it."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import blockstream


def test_every_public_name_is_there_and_listed():
    assert sorted(blockstream.__all__) == blockstream.__all__
    for name in blockstream.__all__:
        assert getattr(blockstream, name) is not None
        assert name in dir(blockstream)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'strem'"):
        _ = blockstream.strem


def test_importing_the_package_imports_no_torch():
    code = "import sys, blockstream; blockstream.AtMost(3); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_signatures_are_those_of_the_documentation():
    def names(function):
        return list(inspect.signature(function).parameters)

    device = ["device", "device_budget"]
    options = ["budget", "arena", "policy", "dtype", "example_inputs", "passes", *device]
    assert names(blockstream.stream) == ["model", "checkpoint", *options]
    assert names(blockstream.from_pretrained) == ["folder", *options, "variant"]
    shared = ["budget", "arena", "policy", "dtype", "variant", *device]
    assert names(blockstream.pipeline) == ["folder_or_pipe", *shared]
    assert names(blockstream.open) == ["budget", "arena", "policy", *device]
    assert names(blockstream.Session.stage)[1:] == [
        "name", "model", "checkpoint", "passes", "dtype", "example_inputs", "around", "pace", "between_s",
    ]  # fmt: skip
