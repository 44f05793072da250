"""The official models' inputs and outputs."""

from tests.support.golden import folder_of, golden

__all__ = ["folder_of", "golden"]
