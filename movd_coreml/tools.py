"""coremltools, imported when it is needed: quietly, in the version this package was tested with."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib import metadata
from typing import Any

from packaging.version import Version

from blockstream.errors import ConfigError

#: What `pip install 'blockstream-engine[coreml]'` brings.
TESTED = Version("9.0")
#: From this version on numpy refuses int() of an array of one element, which coremltools 9.0 calls.
NUMPY_STRICT = Version("2.4")


def available() -> bool:
    """Return whether coremltools is installed."""
    return importlib.util.find_spec("coremltools") is not None


@functools.cache
def coremltools() -> Any:
    """Import coremltools and return it. Raises ConfigError, saying how to install it, where it is not."""
    if not available():
        raise ConfigError(
            "coremltools is not installed; Core ML packages need it: pip install 'blockstream-engine[coreml]'"
        )
    with quiet():
        module = importlib.import_module("coremltools")
        _accept_one_element_arrays()
        _know_view_as()
    return module


@contextmanager
def quiet() -> Iterator[list[str]]:
    """Hold back what coremltools and torch's tracer print in the block; yield the errors logged."""
    logger = logging.getLogger("coremltools")
    said = _Errors()
    propagate, level = logger.propagate, logger.level
    logger.addHandler(said)
    logger.propagate = False
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield said.lines
    finally:
        logger.removeHandler(said)
        logger.propagate = propagate
        logger.setLevel(level)


class _Errors(logging.Handler):
    """Keeps the errors that are logged."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one message."""
        self.lines.append(record.getMessage().strip())


def _accept_one_element_arrays() -> None:
    """Let coremltools 9.0 fold `int` and `bool` of an array with one element under numpy 2.4.

    Fixed after that release (apple/coremltools#2632): later ones are left as they are.
    """
    installed = Version(metadata.version("coremltools"))
    if installed > TESTED or Version(metadata.version("numpy")) < NUMPY_STRICT:
        return
    ops = importlib.import_module("coremltools.converters.mil.frontend.torch.ops")
    original = ops._cast

    def patched(context: Any, node: Any, dtype: type, dtype_name: str) -> None:
        (x,) = ops._get_inputs(context, node, expected=1)
        if x.can_be_folded_to_const() and not isinstance(x.val, dtype):
            context.add(ops.mb.const(val=dtype(x.val.item()), name=node.name), node.name)
        else:
            original(context, node, dtype, dtype_name)

    ops._cast = patched


def _know_view_as() -> None:
    """Teach the converter `Tensor.view_as`, which coremltools 9.0 does not know."""
    registry = importlib.import_module("coremltools.converters.mil.frontend.torch.torch_op_registry")
    if registry._TORCH_OPS_REGISTRY.get_func("view_as") is not None:
        return
    ops = importlib.import_module("coremltools.converters.mil.frontend.torch.ops")

    def view_as(context: Any, node: Any) -> None:
        x, other = ops._get_inputs(context, node, expected=2)
        context.add(ops.mb.reshape(x=x, shape=ops.mb.shape(x=other), name=node.name), node.name)

    registry.register_torch_op(view_as)
