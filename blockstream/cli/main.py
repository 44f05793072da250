"""The command line: find the command, run it, turn errors into one message and an exit code.

Exit codes: 0 well, 1 the run failed, 2 wrong usage or config, 130 interrupted. A command is an object
with `configure(parser)` and `run(args) -> int`; only the one that is named is imported.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import os
import reprlib
import sys
import textwrap
import traceback
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

from blockstream.errors import BlockstreamError, ConfigError, PluginError
from blockstream.plugins import entrypoints
from blockstream.plugins.entrypoints import Installed, nearest
from blockstream.system.terminal import prepare_streams, visible

from .extras import what_to_add

#: The built-in commands: module and summary, so that help imports none of them.
BUILT_IN = {
    "run": ("blockstream.cli.run", "run a config and write its result to a folder"),
    "sweep": ("blockstream.cli.sweep", "run a config for every prompt of a file, on one machine or many"),
    "plan": ("blockstream.cli.plan", "predict a run: what stays, how long, how much memory"),
    "verify": ("blockstream.cli.verify", "compare streamed with resident, bit for bit, or check a pack"),
    "pack": ("blockstream.cli.pack", "write a checkpoint in the form that reads fastest"),
    "synth": ("blockstream.cli.synth", "write a random checkpoint of any architecture, for benchmarks"),
    "report": ("blockstream.cli.report", "draw runs again, compare them side by side"),
    "compare": ("blockstream.cli.compare", "measure what two runs made of the same prompts, side by side"),
    "figures": ("blockstream.cli.figures", "draw loading, inference and straightness as the paper does"),
    "schema": ("blockstream.cli.schema", "print the JSON Schema of config files"),
    "plugins": ("blockstream.cli.plugins", "list what is installed, without importing it"),
    "plugins.new": ("blockstream.cli.new_plugin", "write the package of a plugin to start from"),
    "doctor": ("blockstream.cli.doctor", "measure this machine: disk, memory, processors"),
    "completion": ("blockstream.cli.completion", "print a shell's script that completes commands"),
}

#: How often OpenMP's threads look before they sleep while they wait for one another: for some microseconds.
#: Left to themselves they spin for milliseconds, which takes the cores of those they wait for as soon as
#: anything else runs. Read when torch is imported.
SPINS, SPIN_COUNT = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"), "10000"

ENVIRONMENT = """environment:
  BLOCKSTREAM_DISABLE=a,b        hide plugins and their packages' commands
  BLOCKSTREAM_TRACE_PLUGINS=1    print every hook call
  BLOCKSTREAM_DEBUG=1            print the traceback of an error
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    prepare_streams()
    if not any(name in os.environ for name in SPINS):
        os.environ[SPINS[0]] = SPIN_COUNT
    try:
        _check_here()
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except KeyboardInterrupt:
        _let_go_of_output()
        return _failed("interrupted", 130)
    except BrokenPipeError:
        _let_go_of_output()  # whoever read it has left
        return 1
    except ConfigError as error:
        return _failed(str(error), 2)
    except BlockstreamError as error:
        return _failed(what_to_add(error) or str(error), 1)
    except OSError as error:
        _let_go_of_output()
        return _failed(_of_system(error), 1)
    except Exception as error:
        if add := what_to_add(error):
            return _failed(add, 1)
        hint = "" if _debug() else " (BLOCKSTREAM_DEBUG=1 shows where)"
        return _failed(f"{type(error).__name__}: {error}{hint}", 1)
    return code


def _check_here() -> None:
    """Refuse a working folder that is gone: libraries end the process that is in one."""
    try:
        os.getcwd()
    except OSError as error:
        raise ConfigError(
            f"the working folder cannot be used ({error.strerror}): it was deleted or moved; "
            "change to one that is there"
        ) from error


def _of_system(error: OSError) -> str:
    """Return what the system refused, of which file, and what to do."""
    said = error.strerror or str(error) or type(error).__name__
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    advice = {
        errno.ENOSPC: "free some space and run the same again",
        errno.EDQUOT: "free some space and run the same again",
        errno.ENOENT: "it may have been deleted or moved meanwhile; put it back or name another",
        errno.EACCES: "check its permissions or name another",
        errno.EPERM: "check its permissions or name another",
        errno.EROFS: "name a folder that can be written",
        errno.EMFILE: "raise the limit of open files (ulimit -n) and run the same again",
        errno.ENFILE: "close other programs' files and run the same again",
    }.get(error.errno or 0, "check the disk and the path, and run the same again")
    return f"{where}{said}; {advice}"


def _let_go_of_output() -> None:
    """Send what is left of the output nowhere if it cannot be written; the interpreter would try again."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _dispatch(argv: list[str]) -> int:
    added = _by_name(entrypoints.commands())
    words = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    for length in range(words, 0, -1):
        name = ".".join(argv[:length])
        if name in BUILT_IN or name in added:
            return _run(name, added.get(name, []), argv[length:])
    if words == 0:
        return _top_level(argv, added)
    below = sorted(name for name in added if name.startswith(f"{argv[0]}."))
    if below:
        print(_listing(f"usage: blockstream {argv[0]} COMMAND", {n: added[n] for n in below}))
        return 0 if {"-h", "--help"} & set(argv) else 2
    known = [name.replace(".", " ") for name in (*BUILT_IN, *added)]
    raise ConfigError(f"no command {argv[0]!r}{nearest(argv[0], known)} (commands: {', '.join(known)})")


def _run(name: str, added: list[Installed], rest: list[str]) -> int:
    """Import one command, parse its arguments and run it; a package's command is blamed by name."""
    parser = argparse.ArgumentParser(f"blockstream {name.replace('.', ' ')}", allow_abbrev=False)
    if name in BUILT_IN:
        module, parser.description = BUILT_IN[name]
        command: Any = importlib.import_module(module)
        command.configure(parser)
        return int(_call(command, parser.parse_args(rest)))
    if own := [command for command in added if command.distribution == entrypoints.DISTRIBUTION]:
        added = own  # whoever else takes a name of the engine's
    if len(added) > 1:
        providers = ", ".join(command.provider for command in added)
        raise PluginError(f"command {name!r} is registered by {providers}; uninstall all but one")
    who = f"command {name!r} of {added[0].provider}"
    with contextlib.redirect_stdout(sys.stderr):  # JSON may be asked for, and an import may print
        command = entrypoints.load(added[0], "command")
    with _blaming(f"{who}: configure()"):
        command.configure(parser)
    args = parser.parse_args(rest)
    with _blaming(who):
        code = _call(command, args)
    if code is not None and type(code) is not int:
        raise PluginError(f"{who}: run() returned {reprlib.repr(code)}, expected an exit code")
    return code or 0


@contextlib.contextmanager
def _blaming(who: str) -> Iterator[None]:
    """Turn what a package's command raises into a PluginError, `sys.exit()` too; what is meant passes."""
    try:
        yield
    except (BlockstreamError, BrokenPipeError):
        raise
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        said = _of_system(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise PluginError(f"{who}: {said}") from error


def _call(command: Any, args: argparse.Namespace) -> Any:
    """Run a command; where JSON is asked for, nothing that plugins print comes between."""
    if not (getattr(args, "json", False) or getattr(args, "json_lines", False)):
        return command.run(args)
    from .common import json_alone

    with json_alone():
        return command.run(args)


def _top_level(argv: list[str], added: Mapping[str, list[Installed]]) -> int:
    if argv == ["--version"]:
        print(f"blockstream {metadata.version('blockstream-engine')}")
        return 0
    asked = bool(argv) and set(argv) <= {"-h", "--help"}
    if argv and not asked:
        raise ConfigError(f"unknown option {argv[0]!r}; write blockstream COMMAND [options]")
    print(_help(added), file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


def _help(added: Mapping[str, list[Installed]]) -> str:
    lines = [
        "usage: blockstream COMMAND [options]",
        "       blockstream COMMAND --help, blockstream --version",
        "",
        "Run transformers that do not fit in memory, inside a byte budget.",
        "",
        "commands:",
        *(f"  {name.replace('.', ' '):<14} {summary}" for name, (_, summary) in BUILT_IN.items()),
    ]
    own = {name: found for name, found in added.items() if name not in BUILT_IN}
    if own:
        lines += ["", _listing("commands of installed packages:", own)]
    examples = ", ".join(sorted(entrypoints.examples())) or "none"
    configs = textwrap.fill(f"packaged configs: {examples}", 78, subsequent_indent="  ")
    return "\n".join([*lines, "", configs, "", ENVIRONMENT.rstrip()])


def _listing(title: str, added: Mapping[str, list[Installed]]) -> str:
    rows = [f"  {n.replace('.', ' '):<14} from {found[0].provider}" for n, found in added.items()]
    return "\n".join([title, *rows])


def _by_name(commands: Sequence[Installed]) -> dict[str, list[Installed]]:
    named: dict[str, list[Installed]] = {}
    for command in commands:
        named.setdefault(command.name, []).append(command)
    return named


def _debug() -> bool:
    return os.environ.get("BLOCKSTREAM_DEBUG", "") not in ("", "0")


def _failed(message: str, code: int) -> int:
    if _debug():
        traceback.print_exc()
    with contextlib.suppress(OSError, ValueError):  # nobody can be told
        print(f"blockstream: {visible(message)}", file=sys.stderr)
    return code
