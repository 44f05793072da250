"""Each plugin stands alone: it imports the engine, and nothing heavy until it is built."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

PACKAGES = ("blockstream_lpl", "blockstream_tdtm")


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_plugin_imports_neither_torch_nor_a_model_nor_another_plugin(package):
    where = Path(find_spec(package).origin).parents[1]
    code = f"import sys; sys.path.append({str(where)!r}); import {package}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )
    imported = {name.partition(".")[0] for name in done.stdout.split()}
    assert package in imported
    assert not imported & ({"torch", "movd", *PACKAGES} - {package})
