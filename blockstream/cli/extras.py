"""What optional parts of the package lack here, and which one a module that is not there belongs to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.requirements import Requirement

DISTRIBUTION = "blockstream-engine"
#: Extras that no error names: of who develops the project, and the one of all the others.
UNNAMED = frozenset({"all", "dev", "docs", "test"})
#: Modules whose distributions have other names.
_DISTRIBUTIONS = {"PIL": "pillow", "cv2": "opencv-python-headless"}


def missing_extras() -> dict[str, list[str]]:
    """Return, for each extra of the package that is incomplete, the requirements it lacks."""
    lacking = {extra: [r for r in required if not _satisfied(r)] for extra, required in _extras().items()}
    return {extra: [f"{r.name}{r.specifier}" for r in left] for extra, left in lacking.items() if left}


def what_to_add(error: BaseException) -> str | None:
    """Return, in one line, what to install where a module's absence caused an error; None where none did."""
    absent = next((e for e in _causes(error) if isinstance(e, ModuleNotFoundError) and e.name), None)
    if absent is None or absent.name is None:
        return None
    module = absent.name.partition(".")[0]
    distribution = _DISTRIBUTIONS.get(module, module.replace("_", "-"))
    for extra, required in _extras().items():
        names = [str(r.name) for r in required]
        if distribution in names:
            left = [str(r.name) for r in required if not _satisfied(r)] or [distribution]
            verb = "is" if len(left) == 1 else "are"
            return f"{', '.join(left)} {verb} not installed: pip install '{DISTRIBUTION}[{extra}]'"
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _extras() -> dict[str, Sequence[Requirement]]:
    """Return what each extra adds to the package's own requirements."""
    from packaging.requirements import Requirement

    try:
        described = metadata.metadata(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return {}
    extras = [e for e in described.get_all("Provides-Extra") or [] if e not in UNNAMED]
    required = [Requirement(text) for text in described.get_all("Requires-Dist") or []]
    return {
        extra: [
            r
            for r in required
            if r.marker is not None
            and r.marker.evaluate({"extra": extra})
            and not r.marker.evaluate({"extra": ""})
        ]
        for extra in extras
    }


def _satisfied(requirement: Requirement) -> bool:
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return False
    return requirement.specifier.contains(version, prereleases=True)
