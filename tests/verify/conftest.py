"""Modules beside their resident twins."""

from tests.support.streamed import twins, watched

__all__ = ["twins", "watched"]
