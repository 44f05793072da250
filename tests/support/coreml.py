"""Tests that need coremltools skip where it is not installed."""

import pytest

from movd_coreml.tools import available


def need_coremltools():
    """Skip a test where packages cannot be written."""
    if not available():
        pytest.skip("coremltools is not installed; packages cannot be written")
