"""`blockstream web [CONFIG...]`: make videos in a browser."""

from __future__ import annotations

import argparse
import os
import secrets
import socket
import webbrowser
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from blockstream.errors import ConfigError

TOKEN = "BLOCKSTREAM_WEB_TOKEN"
HOST, PORT = "127.0.0.1", 8321


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = """Show a page that makes runs: prompts and settings, a queue, each run live, what it
        made, and a plan beforehand. Ctrl-C ends the server and the run in progress, which can go on later."""
    parser.add_argument(
        "configs",
        metavar="CONFIG",
        nargs="*",
        help="presets of the page: YAML files or names of packaged examples (default: all packaged ones)",
    )
    parser.add_argument(
        "--runs",
        metavar="DIR",
        type=Path,
        default=Path("out/web"),
        help="the folder of its runs (default: out/web)",
    )
    parser.add_argument(
        "--host",
        default=HOST,
        help=f"the address to listen on (default: {HOST}, this machine alone); needs a token beyond",
    )
    parser.add_argument(
        "--port", type=int, default=PORT, help=f"the port, 0 for a free one (default: {PORT})"
    )
    parser.add_argument(
        "--allow-host",
        metavar="NAME",
        action="append",
        default=[],
        help="another name that the server is called by",
    )
    parser.add_argument("--token", action="store_true", help="ask for a token on this machine too")
    parser.add_argument("--open", action="store_true", help="show the page in the browser")


def run(args: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C."""
    from .app import Site
    from .guard import Guard, is_loopback
    from .presets import load_presets
    from .server import serve

    presets = load_presets(args.configs)
    token = token_for(args.token or not is_loopback(args.host))
    args.runs.mkdir(parents=True, exist_ok=True)
    with _held(args.runs), listening(args.host, args.port) as listener, suppress(KeyboardInterrupt):
        site = Site(presets, args.runs.absolute())
        everywhere = args.host in ("0.0.0.0", "::", "")
        names = [*args.allow_host, socket.gethostname() if everywhere else args.host]
        guarded = Guard(site.app, names, not is_loopback(args.host), token)
        called = names[-1] if everywhere else args.host
        shown = f"[{called}]" if ":" in called else called
        asks = f"?token={token}" if token else ""
        address = f"http://{shown}:{listener.getsockname()[1]}/{asks}"

        def ready() -> None:
            print(f"{address}   (Ctrl-C ends it)", flush=True)
            if args.open:
                webbrowser.open(address)

        serve(guarded, site.hub, listener, ready)
    return 0


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold the folder of the runs for the length of the block."""
    from blockstream.system.atomic import locked

    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder))
        except ConfigError as error:
            raise ConfigError(f"{folder} is another server's; name another folder with --runs") from error
        yield


def token_for(needed: bool) -> str | None:
    """Return the token that every page has to know; None where none is asked for."""
    given = os.environ.get(TOKEN, "")
    if given and len(given) < 16:
        raise ConfigError(f"{TOKEN} has {len(given)} characters; 16 or more can hardly be guessed")
    return given or (secrets.token_urlsafe(24) if needed else None)


def listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens there. Raises ConfigError where it cannot."""
    try:
        family = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][
            0
        ]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        said = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{host}:{port} cannot be listened on ({said}); name another --port or --host"
        ) from error
