"""A fixture: what can lie at a path and is neither a regular file nor a folder."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest


@pytest.fixture(params=["fifo", "socket", "device", "endless", "link to a fifo"])
def odd_file(request, tmp_path):
    """Return what puts an odd thing at a path, and what a refusal says of it."""
    opened = []

    def make(path: Path) -> Path:
        path.unlink(missing_ok=True)
        if request.param == "fifo":
            os.mkfifo(path)
        elif request.param == "socket":
            server = socket.socket(socket.AF_UNIX)
            opened.append(server)
            here = os.open(path.parent, os.O_RDONLY)
            server.bind(f"/proc/self/fd/{here}/{path.name}")  # a socket's path has 108 bytes at most
            os.close(here)
        elif request.param == "link to a fifo":
            if not (tmp_path / "linked").exists():
                os.mkfifo(tmp_path / "linked")
            path.symlink_to(tmp_path / "linked")
        else:
            path.symlink_to("/dev/null" if request.param == "device" else "/dev/zero")
        return path

    said = {"socket": "a socket", "device": "a device", "endless": "a device"}.get(request.param, "a FIFO")
    yield make, f"is {said}; only regular files are read"
    for server in opened:
        server.close()
