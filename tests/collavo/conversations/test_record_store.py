"""What is kept of a file of records: never wrong data, whoever opens, damages or forbids it."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn_records import numbered, pictures, questions, turns, write
from forked import forked, mount, mounting_is_permitted
from measure import memory, opened, private_memory, write_conversations
from torch.utils.data import DataLoader

from collavo.conversations import ConversationDataset, cache, files
from collavo.conversations.store import RecordStore

read = ConversationDataset.from_llava_json


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take files for settled at once."""
    monkeypatch.setattr(cache, "_SETTLED", -1.0)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """List the files that are read through."""
    seen: list[Path] = []
    decoded = files._decoded

    def noted(path: Path, on_chunk: Callable[[bytes], object]) -> Any:
        seen.append(path)
        return decoded(path, on_chunk)

    monkeypatch.setattr(files, "_decoded", noted)
    return seen


def test_a_file_is_read_once_and_again_when_it_changed(
    tmp_path: Path, reads: list[Path], settled: None
) -> None:
    path = write(tmp_path / "chat.json", numbered(1, 2))
    assert questions(read(path)) == questions(read(path)) == ["1", "2"] and len(reads) == 1
    store = tmp_path / ".collavo" / "chat.json" / "records.bin"
    assert store.is_file()
    # Another content of the same size and time; what tells them apart is no more than the inode.
    stat = path.stat()
    write(tmp_path / "other.json", numbered(1, 3)).rename(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert questions(read(path)) == ["1", "3"] and len(reads) == 2
    # The same content, written anew, is not read again.
    path.write_bytes(path.read_bytes())
    assert questions(read(path)) == ["1", "3"] and len(reads) == 2


def test_a_file_that_was_just_written_is_looked_at_whole(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two writes within a tick of the disk's clock look the same."""
    monkeypatch.setattr(cache, "_stat", lambda path: None)
    path = write(tmp_path / "chat.json", numbered(1))
    assert questions(read(path)) == ["1"]
    write(path, numbered(2))
    assert questions(read(path)) == questions(read(path)) == ["2"] and len(reads) == 2


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    """Not what somebody may be writing at this moment, on a disk without locks."""
    path = write(tmp_path / "chat.json", numbered(1))
    kept = tmp_path / ".collavo" / "chat.json"
    kept.mkdir(parents=True)
    left, fresh = (kept / f".collavo-{digit * 16}.tmp" for digit in "0f")
    for file in (left, fresh):
        file.write_bytes(b"half")
    os.utime(left, (time.time() - 7200,) * 2)
    assert questions(read(path)) == ["1"]
    assert not left.exists() and fresh.exists()


def test_a_process_that_has_the_old_records_keeps_them(tmp_path: Path) -> None:
    path = write(tmp_path / "chat.json", numbered(1, 2))
    old = read(path)
    copy = pickle.dumps(old)
    write(path, numbered(3))
    assert questions(read(path)) == ["3"]
    assert questions(old) == ["1", "2"]
    with pytest.raises(ValueError, match=r"records\.bin: it holds the records of another content"):
        pickle.loads(copy)


def test_records_in_loader_workers(tmp_path: Path) -> None:
    data = read(write(tmp_path / "chat.json", numbered(*range(20))))
    loader = DataLoader(
        data, batch_size=5, num_workers=2, collate_fn=list, multiprocessing_context="fork"
    )
    names = [record["name"] for batch in loader for record in batch]
    assert names == [data.file_name(i) for i in range(20)]


def test_a_pickle_holds_no_words(tmp_path: Path, tiny_processor: Callable[..., Any]) -> None:
    records = [{"conversations": turns("What " * 500, "yes")}] * 50
    data = read(write(tmp_path / "chat.json", records), processor=tiny_processor())
    assert len(pickle.dumps(data)) < 4000
    copy = pickle.loads(pickle.dumps(data))
    assert copy[49]["conversation"] == data[49]["conversation"]


@pytest.mark.parametrize("seed", range(3))
def test_damage_is_mended(tmp_path: Path, seed: int) -> None:
    """Bytes that were changed, cut off, or are another file's: the records are read anew."""
    rng = random.Random(seed)
    path = write(tmp_path / "chat.json", numbered(*range(30)))
    kept = tmp_path / ".collavo" / "chat.json"
    read(path)
    whole = (kept / "records.bin").read_bytes()
    for _ in range(40):
        target = rng.choice(sorted(kept.iterdir()))
        content = bytearray(target.read_bytes())
        kind = rng.randrange(4)
        if kind == 0 and content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del content[rng.randrange(len(content) + 1) :]
        elif kind == 2:
            content += rng.randbytes(rng.randrange(1, 40))
        else:
            content = bytearray(len(content))
        target.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = read(path)
            assert questions(data) == [str(n) for n in range(30)], (target, kind)
            assert (kept / "records.bin").read_bytes() == whole


def test_damage_beneath_a_running_process(tmp_path: Path) -> None:
    path = write(tmp_path / "chat.json", numbered(*range(5)))
    data = read(path)
    store = tmp_path / ".collavo" / "chat.json" / "records.bin"
    content = bytearray(store.read_bytes())
    place = content.index(b"number 3")
    with store.open("r+b") as file:  # in place: the map sees it
        file.seek(place)
        file.write(b"wrong")
    assert data.records[2]["conversation"][0]["content"] == "number 2"
    with pytest.warns(UserWarning, match=r"row 3 is damaged; it is made again from .*chat\.json"):
        assert questions(data) == ["0", "1", "2", "3", "4"]
    write(path, numbered(7))
    with store.open("r+b") as file:
        file.seek(place)
        file.write(b"wrong")
    with (
        pytest.warns(UserWarning, match="row 3 is damaged"),
        pytest.raises(ValueError, match=r"chat\.json: it was changed since it was opened"),
    ):
        questions(data)


def test_a_folder_that_takes_nothing_is_kept_in_the_users_cache(
    tmp_path: Path, home: Path, reads: list[Path], settled: None
) -> None:
    (tmp_path / ".collavo").write_text("in the way")
    path = write(tmp_path / "chat.json", numbered(1))
    for _ in range(2):
        assert questions(read(path)) == ["1"]
    assert len(reads) == 1 and [one.name for one in tmp_path.iterdir()] != ["chat.json"]
    assert len(list((home / "collavo").glob("chat.json-*/records.bin"))) == 1
    # Files of one name in two folders do not meet there.
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / ".collavo").write_text("")
    assert questions(read(write(tmp_path / "b" / "chat.json", numbered(2)))) == ["2"]
    assert questions(read(path)) == ["1"] and len(reads) == 2


@pytest.mark.skipif(not mounting_is_permitted(), reason="mounting is not permitted here")
def test_a_disk_for_reading_alone(tmp_path: Path, home: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()

    def work() -> str:
        assert mount(disk)
        path = write(disk / "chat.json", [{"id": 0}, *numbered(1)])
        os.system(f"mount -o remount,ro {disk}")
        with pytest.raises(OSError):
            (disk / "probe").write_text("")
        found = [questions(read(path, on_skip=lambda one: None)) for _ in range(2)]
        return f"{found} {len(list(home.rglob('skipped.jsonl')))}"

    assert forked(work) == (0, "[['1'], ['1']] 1")


def test_a_folder_of_ones_own_and_none_at_all(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "chat.json", numbered(1))
    assert questions(read(path, cache=tmp_path / "kept")) == ["1"]
    assert not (tmp_path / ".collavo").exists() and list((tmp_path / "kept").glob("chat.json-*"))
    (tmp_path / ".collavo").write_text("")
    (home / "collavo").write_text("")
    with pytest.raises(
        OSError, match=r"chat\.json: no folder takes what .*name one that does \(ca"
    ):
        read(path)


def _open(path: Path, barrier: Any, answers: Any) -> None:
    barrier.wait()
    answers.put(questions(read(path, images=path.parent, workers=0)))


def test_processes_that_open_at_once(tmp_path: Path) -> None:
    """One reads and looks, the others wait and take what it found."""
    context = multiprocessing.get_context("fork")
    pictures(tmp_path, "a.png")
    path = write(tmp_path / "chat.json", numbered(*range(300), image="a.png"))
    barrier, answers = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_open, args=(path, barrier, answers)) for _ in range(4)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert found == [[str(n) for n in range(300)]] * 4
    names = {one.name for one in (tmp_path / ".collavo" / "chat.json").iterdir()}
    assert {name for name in names if not name.startswith("checked-")} <= {
        "records.bin", "source.json"
    }  # fmt: skip


def test_a_store_reads_what_it_says(tmp_path: Path) -> None:
    read(write(tmp_path / "chat.json", [{"id": "x"}, *numbered(1, 2)]), on_skip=lambda one: None)
    store = RecordStore(tmp_path / ".collavo" / "chat.json" / "records.bin")
    assert (len(store), store.entries, store.numbers.tolist()) == (2, 3, [1, 2])
    assert [tuple(one)[:2] for one in store.faults] == [(0, "'x'")]
    assert store[1]["id"] == "2" and store.numbers.dtype == np.int32


def test_memory_and_time_of_a_large_file(tmp_path: Path) -> None:
    """A sixteenth of what the goals are for: < 1 s and < 50 MB, < 50 us a record, no copies."""
    path = write_conversations(tmp_path, 6000)
    size = path.stat().st_size / (1 << 20)
    read(path, images=tmp_path)
    time.sleep(0.01)
    costs = json.loads(forked(lambda: json.dumps(opened(path)))[1])
    assert costs["added MB"] < 0.5 * size, costs  # as objects it would be four times the size
    assert costs["cpu"] < 1 / 16 + 0.1 and costs["access us"] < 50, costs
    data = read(path, images=tmp_path)
    one, everything = (private_memory(data, "fork", 2, whole) for whole in (False, True))
    assert everything - one < 0.3 * size
    assert memory() > 0
