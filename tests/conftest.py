"""Every test fails that leaves a thread, a file descriptor or a map behind."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import pytest

from tests.support.odd_files import odd_file  # noqa: F401 (a fixture)

#: Libraries open these once a process, the first time they are used; they are not leaks.
_LASTING_THREADS = ("pymp", "ThreadPoolExecutor-", "asyncio_", "tqdm", "pytest_timeout", "OMP")
_LASTING_FILES = ("anon_inode", "/dev/", "pipe:", "socket:", "/proc/", ".so", ".pyc", ".py", ".ttf")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Keep what is measured out of the user's cache, and what was measured before out of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLOCKSTREAM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def _threads() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if not t.name.startswith(_LASTING_THREADS)}


def _files() -> dict[str, str]:
    """Return the open descriptors of regular files, by number."""
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            name = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
        if name.startswith("/") and not any(x in name for x in _LASTING_FILES):
            found[fd] = name
    return found


def _maps() -> set[str]:
    """Return the files of temporary folders that are mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    names = {line[73:].strip() for line in lines}
    return {n for n in names if n.startswith("/tmp/") and not any(x in n for x in _LASTING_FILES)}


@pytest.fixture(autouse=True)
def leaves_nothing_behind():
    """Fail a test that leaks a thread, a descriptor of a file or a map of a temporary file."""
    threads = _threads()
    linux = os.path.isdir("/proc/self/fd")
    files, maps = (_files(), _maps()) if linux else ({}, set())
    yield
    if not linux:
        return
    if _threads() - threads or _files() != files or _maps() - maps:
        gc.collect()
    left = [t.name for t in _threads() - threads if t.is_alive()]
    assert not left, f"threads left running: {left}"
    opened = {n for fd, n in _files().items() if files.get(fd) != n}
    assert not opened, f"files left open: {opened}"
    mapped = _maps() - maps
    assert not mapped, f"files left mapped: {mapped}"
