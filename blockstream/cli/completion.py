"""`blockstream completion SHELL`: print the script by which a shell completes commands and configs."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Sequence

from blockstream.plugins import entrypoints

#: Each script hands the words before the cursor to this command, and adds file names of its own.
SCRIPTS = {
    "bash": """_blockstream() {
    local word="${COMP_WORDS[COMP_CWORD]}"
    local before=("${COMP_WORDS[@]:1:COMP_CWORD-1}")
    COMPREPLY=($(compgen -W "$(blockstream completion words -- "${before[@]}" 2>/dev/null)" -- "$word"))
}
complete -o default -F _blockstream blockstream
""",
    "zsh": """#compdef blockstream
_blockstream() {
    local -a found
    found=(${(f)"$(blockstream completion words -- "${(@)words[2,CURRENT-1]}" 2>/dev/null)"})
    compadd -a found
    _files
}
compdef _blockstream blockstream
""",
    "fish": """complete -c blockstream -a '(
    set -l words (commandline -opc)
    blockstream completion words -- $words[2..-1] 2>/dev/null
)'
""",
}
#: Commands whose argument is a config.
_OF_CONFIGS = frozenset({"run", "plan", "verify", "schema"})


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("shell", metavar="SHELL", choices=(*SCRIPTS, "words"), help="bash, zsh or fish")
    parser.add_argument("before", nargs="*", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Print the script, or what may follow the words that are there."""
    if args.shell == "words":
        print("\n".join(candidates(args.before)))
    else:
        print(SCRIPTS[args.shell], end="")
    return 0


def candidates(before: Sequence[str]) -> list[str]:
    """Return what may come after words of a command line: commands, then its options and configs."""
    from .main import BUILT_IN

    names = [*BUILT_IN, *(command.name for command in entrypoints.commands())]
    split = [name.split(".") for name in dict.fromkeys(names)]
    typed = [word for word in before if not word.startswith("-")]
    command = max((s for s in split if typed[: len(s)] == s), key=len, default=[])
    follow = [s[len(typed)] for s in split if len(s) > len(typed) and s[: len(typed)] == typed]
    name = ".".join(command)
    found = dict.fromkeys(follow)
    if name in BUILT_IN:
        parser = argparse.ArgumentParser(name, allow_abbrev=False)
        importlib.import_module(BUILT_IN[name][0]).configure(parser)
        found |= dict.fromkeys(re.findall(r"--[a-z-]+", parser.format_help()))
        if name in _OF_CONFIGS:
            found |= dict.fromkeys(entrypoints.examples())
    elif not typed:
        found |= dict.fromkeys(("--help", "--version"))
    return sorted(found)
