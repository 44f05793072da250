"""Modules beside their resident twins, and stores that tests watch, hold and break."""

from tests.support.streamed import twins, watched

__all__ = ["twins", "watched"]
