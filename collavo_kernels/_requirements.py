"""What a part needs beyond the distribution's own bounds is asked for where it is used."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import sys

OLDEST_TRANSFORMERS = "4.37"
"""The oldest transformers beside which the modules of ``collavo_kernels.nn`` are tested."""

OLDEST_WITH_SEAMS = "5.5"
"""The oldest one tested whose masks, caches and models are those that the rest is built on."""


class RequirementError(ImportError):
    """A package that a part of the project needs is missing or too old."""


def require(
    package: str, minimum: str, user: str, *, otherwise: str = "", optional: bool = False
) -> None:
    """Check that a package is installed in a version that a part of the project works with.

    Args:
        package: Its name, for Python and for pip.
        minimum: The oldest version that serves, such as ``"5.5"``.
        user: Who needs it.
        otherwise: What to do instead of installing it; follows the advice to install it.
        optional: Whether the part works without the package.

    Raises:
        RequirementError: if it is missing or older; the versions wanted and found are named.

    Example:
        >>> require("torch", "2.5", "this")
        >>> require("torch", "99", "this")
        Traceback (most recent call last):
            ...
        collavo_kernels._requirements.RequirementError: this needs torch >= 99 and found ...
    """
    if optional and installed_version(package) is None:
        return
    reason = shortfall(package, minimum)
    if reason is not None:
        advice = f"pip install '{package}>={minimum}'{otherwise}"
        raise RequirementError(f"{user} {reason}; {advice}", name=package)


def shortfall(package: str, minimum: str) -> str | None:
    """Say which version of a package is wanted and which is there, or None if that serves."""
    found = installed_version(package)
    if found is not None and _release(found) >= _release(minimum):
        return None
    return f"needs {package} >= {minimum} and found {found or 'none'}"


def installed_version(package: str) -> str | None:
    """Return a package's version, or None if it is not installed.

    Only a package without metadata of its name is imported for it: a source tree, or one that is
    distributed under other names as well (Triton for AMD).

    Args:
        package: Its name, for Python and for pip.
    """
    # What is loaded counts, whatever else the metadata are of.
    loaded = getattr(sys.modules.get(package), "__version__", None)
    if loaded is not None:
        return str(loaded)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pass
    try:
        return getattr(importlib.import_module(package), "__version__", None)
    except ImportError:
        return None


def _release(version: str) -> tuple[int, ...]:
    """Return a release's numbers, without zeros at the end; a pre-release counts as its release."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    parts = [int(part) for part in numbers[0].split(".")] if numbers else []
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)
