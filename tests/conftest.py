"""Every test fails that leaves a thread, a file descriptor or a map behind."""

from __future__ import annotations

import gc
import os
import re
import sys
import threading
from pathlib import Path

import pytest

from tests.support.odd_files import odd_file  # noqa: F401 (a fixture)

COREML = "tests/movd_coreml/"
#: Files whose tests judge what the process holds to some MiB: before others leave holes in its heap.
JUDGES = ("tests/streaming/test_budget.py", "tests/streaming/test_session.py")

#: Libraries open these once a process, the first time they are used; they are not leaks.
_LASTING_THREADS = (
    "pymp",
    "ThreadPoolExecutor-",
    "asyncio_",
    "tqdm",
    "pytest_timeout",
    "OMP",
    "AnyIO worker",
)
_LASTING_FILES = ("anon_inode", "/dev/", "pipe:", "socket:", "/proc/", ".so", ".pyc", ".py", ".ttf")


def pytest_collection_modifyitems(items):
    """Put the judges of memory first."""
    items.sort(key=lambda item: not item.nodeid.startswith(JUDGES))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Give a process whole files; all that need exported packages, which take minutes to make, go to one."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return COREML if file.startswith(COREML) else file

    config.option.loadscopereorder = False
    return ByFile(config, log)


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
    found = re.findall(rb" (/tmp/.*)", Path("/proc/self/maps").read_bytes())
    return {n for n in map(os.fsdecode, found) if not any(x in n for x in _LASTING_FILES)}


#: What was mapped when the last test had ended; reading it is dear (milliseconds), so it is read once a test.
_mapped: set[str] = set()


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef, request):
    """Take what a fixture of a whole module or session maps for its own."""
    made = yield
    if fixturedef.scope != "function" and sys.platform == "linux":
        _mapped.update(_maps())
    return made


@pytest.fixture(autouse=True)
def leaves_nothing_behind():
    """Fail a test that leaks a thread, a descriptor of a file or a map of a temporary file."""
    threads = _threads()
    linux = sys.platform == "linux"
    files = _files() if linux else {}
    yield
    if not linux:
        return
    maps = _maps()
    if _threads() - threads or _files() != files or maps - _mapped:
        gc.collect()
        maps = _maps()
    left = [t.name for t in _threads() - threads if t.is_alive()]
    assert not left, f"threads left running: {left}"
    opened = {n for fd, n in _files().items() if files.get(fd) != n}
    assert not opened, f"files left open: {opened}"
    new = maps - _mapped
    _mapped.clear()
    _mapped.update(maps)
    assert not new, f"files left mapped: {new}"
