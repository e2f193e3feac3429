"""Where what is made of a file of records is kept: beside it, or in the user's cache."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from collavo import writing
from collavo.conversations.store import DamagedStoreError, RecordStore, write_store
from collavo.panoptic.file_names import absolute
from collavo.writing import PathLike

_RECORDS, _SOURCE = "records.bin", "source.json"
# A file that was changed so short a time ago may change again and look the same.
_SETTLED = 2.0
_PAUSE = 0.1
# Of such pauses, before a line says what is waited for.
_PATIENCE = 100
# Whoever still writes has written since: where there are no locks, several may.
_LEFT = 3600.0

_log = logging.getLogger(__name__)


class Cache:
    """What is kept of one file of records.

    It lies in ``.collavo`` beside the file or, where that takes no file, in ``collavo`` of the
    user's cache (``XDG_CACHE_HOME``, else ``~/.cache``). All of it can be made again, and may be
    deleted while nothing reads it.

    Args:
        source: The file.
        folder: Another place for it; None takes those two.
    """

    def __init__(self, source: Path, folder: PathLike | None = None) -> None:
        self.source = source
        path = absolute(source)
        name = f"{path.name[:100]}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:12]}"
        if folder is not None:
            self.places = [Path(folder) / name]
            return
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        self.places = [path.parent / ".collavo" / path.name, Path(home) / "collavo" / name]

    def records(self, *, progress: bool = False) -> RecordStore:
        """Return the file's records; they are read anew if its content is another.

        Args:
            progress: Whether a bar shows how far the file is read.

        Raises:
            FileNotFoundError: if there is no such file.
            OSError: naming the folders, if none takes the records.
            ValueError: naming the file, if it is no list of records.
        """
        found = self._found()
        if found is not None:
            return found
        with self.alone() as place:
            return self._found() or self._made(place, progress)

    def made_again(self, damaged: RecordStore) -> RecordStore:
        """Return the records of a store that has been damaged since it was opened.

        Args:
            damaged: The store.

        Raises:
            ValueError: naming the file, if its content is another by now.
        """
        with self.alone() as place:
            again = self._made(place, progress=False)
        if again.content != damaged.content:
            raise ValueError(f"{self.source}: it was changed since it was opened; open it again")
        return again

    @contextmanager
    def alone(self) -> Iterator[Path]:
        """Yield the folder that can be written to, for one process at a time.

        Raises:
            OSError: naming the folders, if there is none.
        """
        place = self._writable()
        for tried in itertools.count():
            claim = writing.claimed_folder(place)
            try:
                claim.__enter__()
                break
            except BlockingIOError:
                if tried == _PATIENCE:
                    _log.warning("%s: waiting for another process that reads it", self.source)
                time.sleep(_PAUSE)
        try:
            _remove_left(place)
            yield place
        finally:
            claim.__exit__(None, None, None)
            with suppress(OSError):  # there is something in it
                place.rmdir()
                place.parent.rmdir()

    def _found(self) -> RecordStore | None:
        if not self.source.is_file():
            raise FileNotFoundError(f"{self.source}: there is no such file")
        stat = _stat(self.source)
        content = ""
        for place in self.places:
            known = _read_source(place / _SOURCE)
            if stat is not None and known.get("stat") == stat:
                content = str(known.get("content"))
            elif not content and (place / _RECORDS).is_file():
                with self.source.open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
                self._note(place, stat, content)
            if content:
                with suppress(OSError, DamagedStoreError):
                    return RecordStore(place / _RECORDS, content)
        return None

    def _made(self, place: Path, progress: bool) -> RecordStore:
        stat = _stat(self.source)
        size = self.source.stat().st_size
        with (
            tqdm(total=size, unit="B", unit_scale=True, disable=not progress) as bar,
            writing.written_file(place / _RECORDS, sync=False) as temporary,
            temporary.open("wb") as file,
        ):
            bar.set_description(f"reading {self.source.name}")
            content = write_store(self.source, file, bar.update)
        self._note(place, stat, content)
        return RecordStore(place / _RECORDS, content)

    def _note(self, place: Path, stat: list[int] | None, content: str) -> None:
        """Remember by what the content is known again without reading it."""
        if stat is not None:
            with suppress(OSError):
                note = json.dumps({"stat": stat, "content": content})
                writing.write_file(place / _SOURCE, note.encode(), sync=False)

    def _writable(self) -> Path:
        reasons = []
        for place in self.places:
            try:
                place.mkdir(parents=True, exist_ok=True)
                writing.check_file(place / _RECORDS)
                return place
            except OSError as error:
                reasons.append(f"{place}: {error.strerror or error}")
        raise OSError(
            f"{self.source}: no folder takes what is made of it ({'; '.join(reasons)}); name one "
            "that does (cache=)"
        )


def _remove_left(place: Path) -> None:
    """Remove the files of writers that were killed, which may be as large as the records."""
    for path in place.iterdir():
        with suppress(OSError):
            if writing.is_temporary(path.name) and time.time() - path.stat().st_mtime > _LEFT:
                path.unlink()


def _stat(path: Path) -> list[int] | None:
    """Return what changes whenever a file is written, or None if it may have just been."""
    found = path.stat()
    newest = max(found.st_mtime, found.st_ctime)
    if time.time() - newest < _SETTLED:
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _read_source(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
