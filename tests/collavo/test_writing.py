"""Files and folders are there as a whole or not at all, wherever they lie."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import resource
import shutil
import signal
import sys
import threading
import types
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import pytest
from forked import forked, mount, mounting_is_permitted

from collavo import writing
from collavo.model.files import weight_patterns

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
OLD = {"config.json": '{"a": 0}', "model-00001-of-00002.safetensors": "old", "notes.txt": "mine"}
NEW = {"config.json": '{"a": 1}', "model.safetensors": "new", "templates/a.jinja": "new"}
JOINED = {**NEW, "notes.txt": "mine"}
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors")


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def read(folder: Path) -> dict[str, str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_text() for path in paths}


def refuse(code: int) -> Callable[..., NoReturn]:
    def fail(source: Any, *_: Any, **__: Any) -> NoReturn:
        raise OSError(code, os.strerror(code), str(source))

    return fail


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EBUSY, errno.EPERM, errno.ENOTSUP])
def test_where_nothing_can_be_renamed_it_is_copied_and_said(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that is a mount point, as containers make them, and file systems without renaming."""
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, refuse(code))
    with caplog.at_level(logging.WARNING):
        writing.write_file(tmp_path / "a.json", b"new")
        with writing.written_folder(write(tmp_path / "model", OLD), WEIGHTS) as partial:
            write(partial, NEW)
    assert read(tmp_path) == {"a.json": "new", **{f"model/{k}": v for k, v in JOINED.items()}}
    assert f"{tmp_path}: files cannot be renamed here" in caplog.text


@needs_fork
@pytest.mark.parametrize("what", ["file", "folder"])
def test_the_folder_may_be_a_mount_point(tmp_path: Path, what: str) -> None:
    if not mounting_is_permitted():
        pytest.skip("a tmpfs may not be mounted here")

    def work() -> object:
        if not mount(tmp_path):
            raise OSError("not mounted")
        if what == "file":
            writing.write_file(tmp_path / "a", b"new")
            return sorted(read(tmp_path))
        with writing.written_folder(tmp_path, WEIGHTS) as partial:
            write(partial, NEW)
        return sorted(read(tmp_path))

    status, message = forked(work)
    assert (status, message) == (0, str(["a"] if what == "file" else sorted(NEW)))


@pytest.mark.parametrize("what", ["body", "sync"])
def test_what_fails_leaves_what_was_there(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network disk that is full says so when it is synced."""
    write(tmp_path, {"a.json": "old"})
    write(tmp_path / "model", OLD)
    before = read(tmp_path)
    if what == "sync":
        monkeypatch.setattr(os, "fsync", refuse(errno.ENOSPC))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write_half(where: Path, files: dict[str, str]) -> None:
        write(where, files)
        if what == "body":
            raise full

    named = pytest.raises(OSError, match=r"No space left.*a\.json")
    with named, writing.written_file(tmp_path / "a.json") as temporary:
        write_half(temporary.parent, {temporary.name: "half"})
    for name in ("model", "fresh"):
        failing = pytest.raises(OSError, match="No space left")
        with failing, writing.written_folder(tmp_path / name, WEIGHTS) as partial:
            write_half(partial, NEW)
    assert read(tmp_path) == before and not (tmp_path / "fresh").exists()


def test_names_as_long_as_names_can_be(tmp_path: Path) -> None:
    """A temporary name made of the file's own would be too long."""
    path = tmp_path / ("n" * 250 + ".json")
    writing.write_file(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_file_that_is_replaced_keeps_its_mode(tmp_path: Path) -> None:
    """Else what its owner alone could read is there for all; a new file's mode is the umask's."""
    (tmp_path / "usual").touch()
    write(tmp_path, {"a": "old", "config.json": "old", "model.safetensors": "old"})
    for name in read(tmp_path).keys() - {"usual"}:
        (tmp_path / name).chmod(0o600)
    writing.write_file(tmp_path / "a", b"new")
    with writing.written_folder(tmp_path, WEIGHTS) as partial:
        write(partial, NEW)
    modes = {name: (tmp_path / name).stat().st_mode & 0o777 for name in read(tmp_path)}
    usual = modes.pop("usual")
    assert modes.pop("templates/a.jinja") == usual and set(modes.values()) == {0o600}


def test_windows_syncs_only_what_is_open_for_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There ``fsync`` of a file open for reading is EBADF."""

    def fsync(handle: int) -> None:
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        os.fsync(handle)

    windows = types.SimpleNamespace(**{**vars(os), "name": "nt", "fsync": fsync})
    monkeypatch.setattr(writing, "os", windows)
    writing.write_file(tmp_path / "a", b"new")
    with writing.written_folder(tmp_path / "model", WEIGHTS) as partial:
        write(partial, NEW)
    assert read(tmp_path) == {"a": "new", **{f"model/{name}": text for name, text in NEW.items()}}


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    write(tmp_path, {"data/a": "old"})
    (tmp_path / "a").symlink_to(tmp_path / "data/a")
    writing.write_file(tmp_path / "a", b"new")
    assert (tmp_path / "a").is_symlink() and (tmp_path / "data/a").read_text() == "new"


@needs_fork
def test_pipes_and_devices_are_written_to(tmp_path: Path) -> None:
    """``--output /dev/stdout`` and a named pipe; neither may be replaced by a file."""
    os.mkfifo(tmp_path / "pipe")
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    writing.check_file("/dev/stdout")
    writing.write_file(tmp_path / "pipe", b"new")
    reader.join(timeout=60)
    assert found == [b"new"] and (tmp_path / "pipe").is_fifo()
    writing.write_file(os.devnull, b"new")
    assert not Path(os.devnull).is_file()

    def work() -> None:
        log = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        writing.write_file("/dev/stdout", b"scores\n")
        os.write(1, b"scores\nand a table\n")

    assert forked(work)[0] == 0
    assert (tmp_path / "log").read_text() == "scores\nand a table\n"


@needs_fork
def test_a_file_in_a_folder_that_takes_no_new_one(tmp_path: Path) -> None:
    write(tmp_path, {"there/a": "old"})
    (tmp_path / "there/a").chmod(0o666)
    (tmp_path / "there").chmod(0o555)
    for folder in (tmp_path, *tmp_path.parents):  # pytest's own are its user's alone
        if "pytest" in str(folder):
            folder.chmod(folder.stat().st_mode | 0o555)

    def work() -> str:
        if os.getuid() == 0:
            os.setuid(65534)  # root may write everywhere
        writing.check_file(tmp_path / "there/a")
        writing.write_file(tmp_path / "there/a", b"new")
        try:
            writing.check_file(tmp_path / "there/b")
        except PermissionError as error:
            return str(error)
        return "written"

    status, message = forked(work)
    (tmp_path / "there").chmod(0o755)
    assert status == 0, message
    assert "Permission denied" in message and "there/b" in message and ".tmp" not in message
    assert read(tmp_path) == {"there/a": "new"}


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "scores.json").mkdir()
    for work in (writing.check_file, lambda path: writing.write_file(path, b"")):
        with pytest.raises(IsADirectoryError, match=r"expected a file.*scores\.json"):
            work(tmp_path / "scores.json")
    with pytest.raises(FileNotFoundError, match="none/a"):
        writing.check_file(tmp_path / "none/a")


def killed_at(call: int, work: Callable[[], object]) -> Callable[[], object]:
    """Let the work kill itself at its n-th call that opens, renames or removes something."""

    def run() -> None:
        seen = 0

        def hook(event: str, _: Any) -> None:
            nonlocal seen
            if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
                seen += 1
                if seen == call:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        work()

    return run


def without_renaming() -> None:
    """Take renaming from this process, as mountpoint-s3 does; copied files are half there first."""

    def copy(source: Path, target: Path) -> None:
        content = Path(source).read_bytes()
        Path(target).write_bytes(content[: len(content) // 2])
        Path(target).write_bytes(content)

    os.rename = os.replace = refuse(errno.ENOTSUP)
    shutil.copyfile = copy  # type: ignore[assignment]


@needs_fork
@pytest.mark.parametrize("renames", [True, False])
def test_killed_at_every_call_a_folder_is_one_model_or_none(tmp_path: Path, renames: bool) -> None:
    """With a whole ``config.json`` it is the old or the new one; ``settle`` brings it to either."""
    found = set()
    for call in range(1, 200):
        folder = write(tmp_path / str(call), OLD)

        def work(folder: Path = folder) -> None:
            if not renames:
                without_renaming()
            with writing.written_folder(folder, WEIGHTS) as partial:
                write(partial, NEW)

        status, _ = forked(killed_at(call, work))
        between = {name: text for name, text in read(folder).items() if name[0] != "."}
        if between.get("config.json") in (OLD["config.json"], NEW["config.json"]):
            assert between in (OLD, JOINED)
            writing.check_settled(folder)
        else:
            with pytest.raises(FileNotFoundError, match=rf"writing\.settle\('{folder}'\)"):
                writing.check_settled(folder)
        forked(killed_at(call % 7 + 1, lambda folder=folder: writing.settle(folder)))
        writing.settle(folder)
        after = read(folder)
        assert after in (OLD, JOINED)
        found.add(after == JOINED)
        if status == 0:
            break
    assert status == 0 and found == {True, False}


@pytest.mark.parametrize("killed", [False, True])
def test_only_weights_that_would_be_taken_for_these_are_replaced(
    tmp_path: Path, killed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variant beside the default, and somebody's average, stay; for ``settle`` too."""
    kept = {"model.safetensors": "default", "model_ema.safetensors": "mine"}
    new = {"model.fp16.safetensors": "new"}
    write(tmp_path, {**kept, "model.fp16-00001-of-00002.safetensors": "old"})
    failing = pytest.raises(OSError, match="files that were to go there are in")
    with monkeypatch.context() as patch, failing if killed else nullcontext():
        if killed:
            patch.setattr(writing, "_put", refuse(errno.EIO))
        with writing.written_folder(tmp_path, weight_patterns("fp16")) as partial:
            write(partial, new)
    writing.settle(tmp_path)
    assert read(tmp_path) == {**kept, **new}


def test_settling_leaves_what_is_somebody_elses(tmp_path: Path) -> None:
    mine = {".collavo-notes/a": "1", ".x.partial/b": "2", "c.tmp": "3", ".collavo-1.tmp": "4"}
    write(tmp_path, {**mine, f".collavo-{'0' * 16}.tmp": "", f".collavo-{'0' * 16}.partial/a": ""})
    writing.settle(tmp_path)
    assert read(tmp_path) == mine
    writing.settle(tmp_path / "none")


def test_sizes_are_compared_with_the_disk(tmp_path: Path) -> None:
    writing.check_size(tmp_path, 1, 10**9)  # made without content
    with pytest.raises(OSError, match=rf"expected 1000000000\.0 GB of free space, got.*{tmp_path}"):
        writing.check_size(tmp_path, 10**18, 1)
    assert read(tmp_path) == {}


@needs_fork
def test_a_limit_on_the_size_of_files_is_found(tmp_path: Path) -> None:
    def work() -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        writing.check_size(tmp_path, 1001, 1001)

    status, message = forked(work)
    assert (
        status == 1 and "expected a file of 1.0 kB to be possible, got: File too large" in message
    )
    assert read(tmp_path) == {}


def save(folder: Path, content: str) -> None:
    with writing.written_folder(folder, WEIGHTS) as partial:
        write(partial, {"config.json": f'{{"a": "{content}"}}', "model.safetensors": content})


@pytest.mark.parametrize("last_is_broken_off", [False, True])
def test_the_last_of_several_saves_stays(
    last_is_broken_off: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an earlier save had still to bring was brought over a later one: an older model."""

    def broken_off(partial: Path, folder: Path) -> NoReturn:
        raise KeyboardInterrupt

    for turn in range(6):  # the names of what is left are drawn
        folder = tmp_path / str(turn)
        with monkeypatch.context() as kill:
            kill.setattr(writing, "_publish", broken_off)
            for content in ("first", "second", *(["third"] if last_is_broken_off else [])):
                with pytest.raises(KeyboardInterrupt):
                    save(folder, content)
        if not last_is_broken_off:
            save(folder, "third")
        writing.settle(folder)
        assert read(folder) == {"config.json": '{"a": "third"}', "model.safetensors": "third"}
