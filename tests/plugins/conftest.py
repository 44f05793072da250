"""The plugins of this repository can be imported here also where only their sources are."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from ..golden.conftest import Golden

if find_spec("blockstream_sta") is None:
    sys.path.append(str(Path(__file__).resolve().parents[2] / "plugins"))


@pytest.fixture(scope="module")
def golden(request):
    """The golden data named by the module's FOLDER."""
    return Golden(request.module.FOLDER)


@pytest.fixture(scope="session")
def folder_of():
    return Golden
