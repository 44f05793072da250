"""The messages of a Core ML model file, from coremltools but without importing coremltools itself.

Its generated protobuf modules are all that reading a package needs. Importing the whole of it takes seconds
and some 170 MB, which would come out of the budget of a run; these modules take 7 MB.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

from blockstream.errors import ConfigError

#: What the messages' package is called here when coremltools itself has not been imported.
OWN_NAME = "movd_coreml_proto"
INSTALL = "pip install 'blockstream-engine[coreml]'"


@cache
def messages() -> tuple[ModuleType, ModuleType]:
    """Return coremltools' modules `Model_pb2` and `MIL_pb2`; ConfigError says how to install them."""
    try:
        package = _package()
        model = importlib.import_module(f"{package}.Model_pb2")
        mil = importlib.import_module(f"{package}.MIL_pb2")
    except ImportError as error:
        raise ConfigError(
            f"reading a Core ML package needs coremltools, which cannot be imported here ({error}); {INSTALL}"
        ) from error
    return model, mil


def _package() -> str:
    """Return the importable name of coremltools' folder of generated modules."""
    if "coremltools" in sys.modules:
        return "coremltools.proto"
    if OWN_NAME not in sys.modules:
        found = importlib.util.find_spec("coremltools")
        if found is None or not found.submodule_search_locations:
            raise ImportError("it is not installed")
        folder = Path(found.submodule_search_locations[0]) / "proto"
        spec = importlib.util.spec_from_file_location(
            OWN_NAME, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        if spec is None or spec.loader is None or not (folder / "__init__.py").is_file():
            raise ImportError(f"{folder} holds no generated modules")
        module = importlib.util.module_from_spec(spec)
        sys.modules[OWN_NAME] = module
        spec.loader.exec_module(module)
    return OWN_NAME
