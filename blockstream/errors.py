"""The exceptions of the package.

    BlockstreamError
    ├── ConfigError            a YAML file, an option or a --set that cannot be used
    ├── PluginError            a plugin that failed, blamed by name and hook
    ├── BudgetError            the budget or the arena cannot hold what is asked
    ├── CheckpointError        a file that is not what it says: truncated, lying, foreign
    ├── ModelError             a module that cannot be streamed as it is
    │   └── AliasError         a tensor that shares storage with a slot outlives it
    ├── EngineError            the engine was used out of order or has been closed
    ├── NonFiniteError         a result with numbers that are not finite: it means nothing
    └── SegmentLoadError       a segment could not be loaded; names segment, file and cause

Every message says what, with which values, and the next step.
"""

from __future__ import annotations


class BlockstreamError(Exception):
    """Base of every error the package raises on purpose."""


class ConfigError(BlockstreamError):
    """A YAML file, an option or a `--set` that cannot be used."""


class PluginError(BlockstreamError):
    """A plugin that failed: the message names the plugin and the hook."""


class BudgetError(BlockstreamError):
    """The budget or the arena cannot hold what is asked; the message names the least that can."""


class CheckpointError(BlockstreamError):
    """A checkpoint that is not what it says: truncated, lying, foreign, incomplete."""


class ModelError(BlockstreamError):
    """A module that cannot be streamed as it is; the message says what to do."""


class AliasError(ModelError):
    """A tensor that shares storage with a slot would outlive the segment; names the module."""


class EngineError(BlockstreamError):
    """The engine was used out of order or has been closed."""


class NonFiniteError(BlockstreamError):
    """A result with numbers that are not finite; names what, and the first of them."""


class SegmentLoadError(BlockstreamError):
    """A segment could not be loaded; names the segment, the file and the cause."""
