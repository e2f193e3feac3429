"""Files and folders that are there as a whole or not at all, and what can be tried beforehand.

What is written lies first under a temporary name *in the same folder*, so that the folder itself
may be a mount point, is synced to the disk, and is then renamed. Where a file system cannot rename,
the bytes are copied into place, and a line of the log says so.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

PathLike = str | os.PathLike[str]

_log = logging.getLogger(__name__)
_TOKEN = r"\.collavo-[0-9a-f]{16}"
_TEMPORARY = re.compile(rf"{_TOKEN}\.tmp")
_PARTIAL = re.compile(rf"{_TOKEN}\.partial")
_NAMES = ".names.json"
_CONFIG = "config.json"
# A file that may be written although its folder takes no new one.
_NO_NEW_FILE = (errno.EACCES, errno.EPERM, errno.EROFS)
# What a rename fails with because there is no room, which a copy would not mend.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_NEVER_SYNCED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EROFS)


def write_file(path: PathLike, content: bytes, *, sync: bool = True) -> None:
    """Write a file that is there as a whole or not at all.

    Args:
        path: Where; its folder must exist. A symbolic link stays one, and a file that is there
            keeps its mode; a pipe, a device and a file in a folder that takes no new one are
            written in place.
        content: The bytes.
        sync: Whether to wait for the disk. Without, a full network disk may be noticed too late,
            and a power failure can leave an empty file: for what can be made again.

    Raises:
        OSError: naming the file. What was there is still there, but for a file that is written in
            place, or copied into it since nothing can be renamed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_file(Path(folder) / "scores.json", b"{}")
        ...     [path.name for path in Path(folder).iterdir()]
        ['scores.json']
    """
    with written_file(path, sync=sync) as temporary:
        temporary.write_bytes(content)


@contextmanager
def written_file(path: PathLike, *, sync: bool = True) -> Iterator[Path]:
    """Yield a name to write to; that file takes the place of ``path`` if all went well.

    Args:
        path: As for :func:`write_file`.
        sync: As for :func:`write_file`.

    Raises:
        OSError: naming the file.
    """
    path = Path(path)
    if _is_stream(path):
        yield path
        return
    target = Path(os.path.realpath(path))
    temporary = _temporary(target.parent)
    try:
        if not _can_begin(temporary, target):
            yield target
            return
        yield temporary
        if sync:
            _sync(temporary)
        _put(temporary, target)
        if sync:
            _sync_folder(target.parent)
    except OSError as error:
        raise _naming(error, path, temporary) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def written_folder(folder: PathLike, replaces: Sequence[str]) -> Iterator[Path]:
    """Yield a folder to write into; its files join those of ``folder`` if all went well.

    Otherwise they are removed and ``folder`` stays as it was. Files of the same names are replaced,
    and so is a model in other files, which would be read instead of the new one or beside it.
    ``config.json`` goes first and comes last: a folder that a kill leaves between two models is not
    read as either, and :func:`settle` brings it to the new one.

    Args:
        folder: Is made if it is not there; it may be a mount point.
        replaces: Patterns of the names that a loader could take for the weights written here, as
            of ``collavo.model.files.weight_patterns``; other files are somebody else's. Empty where
            no weights are written, or into a new folder.

    Raises:
        OSError: naming the file that could not be written, or where all of them are if they could
            be written and not brought to their places.
    """
    folder = Path(os.path.realpath(folder))
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".collavo-{secrets.token_hex(8)}.partial"
    try:
        partial.mkdir()
        yield partial
        synced_files(partial)
        _keep(partial, replaces)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if made:
            with suppress(OSError):
                folder.rmdir()
        raise
    # What an earlier save had still to bring would be brought over this one.
    for older in _whole_saves(folder):
        if older != partial and _kept(older).get("replaces") == list(replaces):
            shutil.rmtree(older, ignore_errors=True)
    _publish(partial, folder)


@contextmanager
def claimed_folder(folder: PathLike) -> Iterator[None]:
    """Keep a folder for one process, or thread, of those that claim it; a kill ends the claim.

    Where the system or the folder's disk knows no locks, nobody is kept out.

    Args:
        folder: Is made if it is not there, and removed after an error if it is empty then.

    Raises:
        OSError: naming the folder, if another one writes to it or it cannot be made.
    """
    folder = Path(os.path.realpath(folder))
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    handle = _locked(folder)
    try:
        yield
    except BaseException:
        if made:
            with suppress(OSError):
                folder.rmdir()
        raise
    finally:
        if handle is not None:
            os.close(handle)


def check_file(path: PathLike) -> None:
    """Raise unless a file could be written; what is there stays as it is.

    Args:
        path: As for :func:`write_file`.

    Raises:
        OSError: naming the file or its folder.
    """
    path = Path(path)
    if _is_stream(path):
        return
    target = Path(os.path.realpath(path))
    probe = _temporary(target.parent)
    try:
        if _can_begin(probe, target):
            probe.write_bytes(b"probe")
            _sync(probe)
            _put(probe, renamed := _temporary(target.parent))
            renamed.unlink()
    except OSError as error:
        raise _naming(error, path, probe) from error
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


def settle(folder: PathLike) -> None:
    """Clear up after writers that were killed: finish what was whole, remove what was not.

    Call it while nothing else writes to the folder.

    Args:
        folder: That :func:`written_folder` or :func:`write_file` wrote to; it may be missing.

    Raises:
        OSError: if what was whole could not be brought to its place.
    """
    folder = Path(folder)
    for partial in _whole_saves(folder):
        _log.warning("%s: a save that was broken off is brought to its end", folder)
        _publish(partial, folder)
    for name in os.listdir(folder) if folder.is_dir() else ():
        if _PARTIAL.fullmatch(name):
            shutil.rmtree(folder / name, ignore_errors=True)
        elif _TEMPORARY.fullmatch(name):
            with suppress(OSError):
                (folder / name).unlink()


def synced_files(folder: PathLike) -> dict[str, int]:
    """Wait until the disk has all files of a folder, and return their sizes in bytes by name.

    Args:
        folder: Its subfolders are looked into too.

    Raises:
        OSError: naming the file that the disk does not take.
    """
    folder = Path(folder)
    sizes = {}
    for name in _files(folder):
        _sync(folder / name)
        sizes[name] = (folder / name).stat().st_size
    _sync_folder(folder)
    return sizes


def is_temporary(name: str) -> bool:
    """Say whether a file's name is one under which :func:`write_file` writes.

    Args:
        name: Without its folder.
    """
    return _TEMPORARY.fullmatch(name) is not None


def is_unfinished(name: str) -> bool:
    """Say whether a name is one under which a writer that was killed leaves something.

    Args:
        name: Without its folder.
    """
    return is_temporary(name) or _PARTIAL.fullmatch(name) is not None


def check_settled(folder: PathLike) -> None:
    """Raise if a model's folder is between two models, since a save was killed as it ended.

    Args:
        folder: The model's.

    Raises:
        FileNotFoundError: naming the folder and how it is mended.
    """
    folder = Path(folder)
    if _read_object(folder / _CONFIG):  # half of one, where files are copied into place, is none
        return
    if _whole_saves(folder):
        raise FileNotFoundError(
            f"{folder}: a save was broken off while its files were brought here; "
            f"collavo.writing.settle({str(folder)!r}) brings the rest"
        )


def check_size(folder: PathLike, total: int, largest: int) -> None:
    """Raise unless a folder has room for files that are to be written.

    Args:
        folder: Where.
        total: Bytes of all files.
        largest: Bytes of the largest one. A file of that size is made, without content, since a
            file system or a limit of the process (``ulimit -f``) may not take it.

    Raises:
        OSError: naming the folder, what is needed and what is there.
    """
    disk = shutil.disk_usage(folder)
    if disk.total and disk.free < total:  # some network disks say 0 of 0
        raise OSError(
            errno.ENOSPC,
            f"expected {_in_words(total)} of free space, got {_in_words(disk.free)}",
            os.fspath(folder),
        )
    probe = _temporary(Path(folder))
    try:
        with probe.open("xb") as file:
            file.truncate(largest)
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise OSError(
                error.errno,
                f"expected a file of {_in_words(largest)} to be possible, got: {error.strerror}",
                os.fspath(folder),
            ) from error
        if error.errno not in _NEVER_SYNCED:  # elsewhere a file cannot be without content
            raise
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


def _in_words(size: int) -> str:
    amount = float(size)
    for unit in ("bytes", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "bytes" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} GB"


def _temporary(folder: Path) -> Path:
    # A name of its own for every write, and short: the file's own may be as long as names can be.
    return folder / f".collavo-{secrets.token_hex(8)}.tmp"


def _locked(folder: Path) -> int | None:
    """Return an open file that holds the folder's lock, None where there are no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        reason = "another process is writing to this folder"
        raise OSError(error.errno, reason, os.fspath(folder)) from error
    except OSError:  # some network disks
        os.close(handle)
        return None
    return handle


def _is_stream(path: Path) -> bool:
    # The last two are names of an open file: replacing that would take it from who has it open.
    opened = os.fspath(path).startswith(("/dev/std", "/dev/fd/", "/proc/"))
    return opened or (path.exists() and not path.is_file() and not path.is_dir())


def _can_begin(temporary: Path, target: Path) -> bool:
    """Make the empty temporary file; False where only the target itself can be written."""
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "expected a file, this is a folder", str(target))
    try:
        temporary.open("xb").close()
    except OSError as error:
        replaceable = error.errno in _NO_NEW_FILE and target.is_file()
        if not (replaceable and os.access(target, os.W_OK)):
            raise
        _log.warning("%s: written in place, since its folder takes no new file (%s)", target, error)
        return False
    return True


def _publish(partial: Path, folder: Path) -> None:
    """Bring the files of a folder that is whole to their places in the one around it."""
    kept = _kept(partial)
    names, replaces = kept["names"], kept["replaces"]
    try:
        if (partial / _CONFIG).exists():
            _take_mode(folder / _CONFIG, partial / _CONFIG)
            (folder / _CONFIG).unlink(missing_ok=True)
        if any(Path(name).match(pattern) for name in names for pattern in replaces):
            for stale in {path for pattern in replaces for path in folder.glob(pattern)}:
                if stale.relative_to(folder).as_posix() not in names:
                    stale.unlink()
        for name in sorted(names, key=lambda name: name == _CONFIG):
            if (partial / name).exists():  # else it was put there before a kill
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                _put(partial / name, folder / name)
        for inner in {(folder / name).parent for name in names}:
            _sync_folder(inner)
        (partial / _NAMES).unlink()  # from here on it is no save that could be brought again
    except OSError as error:
        reason = f"{error.strerror or error}; the files that were to go there are in {partial}"
        raise OSError(error.errno, reason, str(error.filename or folder)) from error
    shutil.rmtree(partial, ignore_errors=True)


def _keep(partial: Path, replaces: Sequence[str]) -> None:
    """Mark a folder as whole by what a second try needs, which finds fewer files."""
    kept = {"names": _files(partial), "replaces": list(replaces)}
    (partial / _NAMES).write_text(json.dumps(kept), encoding="utf-8")
    _sync(partial / _NAMES)
    _sync_folder(partial)


def _kept(partial: Path) -> dict[str, list[str]]:
    """Return what :func:`_keep` wrote; a folder without it, or with half of it, is not whole."""
    return _read_object(partial / _NAMES)


def _whole_saves(folder: Path) -> list[Path]:
    """Return the saves into a folder that are whole and not yet at their places, oldest first."""
    found = folder.iterdir() if folder.is_dir() else ()
    whole = [path for path in found if _PARTIAL.fullmatch(path.name) and _kept(path)]
    return sorted(whole, key=lambda path: (path / _NAMES).stat().st_mtime_ns)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _files(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != _NAMES)
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _put(source: Path, target: Path) -> None:
    """Rename a file, or copy it where that cannot be done; the mode is what the target's was."""
    _take_mode(target, source)
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno in _NO_ROOM or target.is_dir():
            raise
        _say_copied(target.parent, error.strerror or str(error))
        shutil.copyfile(source, target)
        _sync(target)


def _take_mode(old: Path, new: Path) -> None:
    with suppress(OSError):  # there is none, or the file system has no modes
        shutil.copymode(old, new)


@cache
def _say_copied(folder: Path, reason: str) -> None:
    _log.warning(
        "%s: files cannot be renamed here (%s), so they are copied into place: one that is broken "
        "off while it is copied is not whole",
        folder,
        reason,
    )


def _sync(path: Path) -> None:
    # Windows syncs only what is open for writing, and opens no folder.
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NEVER_SYNCED:
            raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(handle)


def _sync_folder(folder: Path) -> None:
    # The names; a system that cannot sync them has written them by itself or never will.
    with suppress(OSError):
        _sync(folder)


def _naming(error: OSError, path: Path, temporary: Path) -> OSError:
    if error.errno is None:
        return OSError(f"{path}: {error}")
    own = error.filename is None or os.fspath(error.filename) == os.fspath(temporary)
    return OSError(error.errno, error.strerror, str(path) if own else error.filename)
