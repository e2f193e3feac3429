"""How a conversion writes: shard by shard, and whole or not at all."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import forked, mount, mounting_is_permitted

from collavo import load_pretrained, writing
from collavo.conversion import Options, convert_folder, stream
from tests.collavo.conversion.official_folder import (
    Sizes,
    official_config,
    official_shapes,
    official_tensors,
    read_folder,
    write_folder,
)

SMALL = Sizes()
# 345 MB.
WIDE = Sizes(hidden=1024, inner=4096, layers=10, heads=16, kv_heads=8, rank=32, width=128)
MEASURED = """
import sys
from pathlib import Path
from collavo.conversion import Options, convert_folder

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

before = peak()
folder = Path(sys.argv[1])
convert_folder(folder / "safetensors", folder / "dense")
convert_folder(folder / "torch", folder / "4 bits", Options(quantize="nf4"))
print((peak() - before) * 1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_the_peak_is_below_twice_the_largest_shard(tmp_path: Path) -> None:
    """And 300 MB more, above the peak after imports: less than all files together.

    Of both formats, one with ``--quantize``: a process has one peak.
    """
    tensors = {
        name: torch.full(shape, 0.01, dtype=torch.float16)
        for name, shape in official_shapes(WIDE).items()
    }
    for kind in ("safetensors", "torch"):
        write_folder(tmp_path / kind, tensors, official_config(WIDE), kind=kind, shards=24)
        sizes = [path.stat().st_size for path in (tmp_path / kind).glob("*-of-*")]
        assert sum(sizes) > 2 * max(sizes) + 300e6
    found = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert int(found.stdout) < 2 * max(sizes) + 300e6


def test_shards_and_their_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_SMALLEST_LIMIT", 1000)
    source = write_folder(tmp_path / "o", official_tensors(SMALL), official_config(SMALL), shards=3)
    largest = max(path.stat().st_size for path in source.glob("*-of-*"))
    convert_folder(source, tmp_path / "own")
    index = json.loads((tmp_path / "own" / "model.safetensors.index.json").read_text())
    names = sorted(path.name for path in (tmp_path / "own").glob("*.safetensors"))
    assert names == [
        f"model-{n:05d}-of-{len(names):05d}.safetensors" for n in range(1, len(names) + 1)
    ]
    assert len(names) > 3 and set(index["weight_map"].values()) == set(names)
    found = read_folder(tmp_path / "own")
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in found.values())
    assert set(index["metadata"]["crc32"]) == set(names)
    assert all((tmp_path / "own" / name).stat().st_size < largest for name in names)
    load_pretrained(tmp_path / "own")


def test_tensors_that_share_storage_are_written_apart(tmp_path: Path) -> None:
    """A torch file may hold one storage under two names, or a view of a larger one."""
    tensors = official_tensors(SMALL)
    whole = torch.cat([tensors["model.norm.weight"], tensors["model.layers.0.ffn_norm.weight"]])
    tensors["model.norm.weight"], tensors["model.layers.0.ffn_norm.weight"] = whole.split(64)
    tensors["model.layers.1.ffn_norm.weight"] = tensors["model.layers.1.attention_norm.weight"]
    name = "model.layers.0.feed_forward.w1.Plora_main.weight"
    tensors[name] = tensors[name].T.contiguous().T
    source = write_folder(tmp_path / "o", tensors, official_config(SMALL), kind="torch")
    convert_folder(source, tmp_path / "own")
    convert_folder(tmp_path / "own", tmp_path / "back", to_official=True)
    for key, value in read_folder(tmp_path / "back").items():
        assert torch.equal(value, tensors[key]) or "w2.Plora_seg" in key


def _killed(source: Path, target: Path, moment: str) -> None:
    """Convert, and be killed as a shard is written or as files are brought to their places."""
    torch.set_num_threads(1)
    real_save, real_put, put = stream.save_file, writing._put, []

    def save(*args: Any, **kwargs: Any) -> None:
        real_save(*args, **kwargs)
        if moment == "written":
            os.kill(os.getpid(), signal.SIGKILL)

    def bring(old: Path, new: Path) -> None:
        real_put(old, new)
        put.append(new)
        if moment == "moved" and len(put) == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    stream.save_file, writing._put = save, bring  # type: ignore[assignment]
    convert_folder(source, target)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("there", [True, False])
def test_a_kill_leaves_no_folder_that_loads(there: bool, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "o", official_tensors(SMALL), official_config(SMALL))
    target = tmp_path / "own"
    if there:
        target.mkdir()
    status, _ = forked(lambda: _killed(source, target, "written"))
    assert status == -signal.SIGKILL and list(target.iterdir())
    with pytest.raises(FileNotFoundError, match=r"config\.json: missing"):
        load_pretrained(target)
    convert_folder(source, target)  # what was left is removed
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors"]
    load_pretrained(target)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_kill_at_the_end_leaves_what_can_be_brought_to_its_end(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "o", official_tensors(SMALL), official_config(SMALL))
    target = tmp_path / "own"
    assert forked(lambda: _killed(source, target, "moved"))[0] == -signal.SIGKILL
    for use in (
        load_pretrained,
        lambda folder: convert_folder(source, folder),
        lambda folder: convert_folder(folder, tmp_path / "back", to_official=True),
    ):
        with pytest.raises(FileNotFoundError, match=r"collavo\.writing\.settle"):
            use(target)
    writing.settle(target)
    load_pretrained(target)


@pytest.mark.skipif(sys.platform == "win32", reason="this system has no locks on folders")
@pytest.mark.parametrize("there", [True, False])
def test_of_two_at_once_one_is_refused(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ended well, and left shards of both; or one took the other's unfinished files away."""
    source = write_folder(tmp_path / "o", official_tensors(SMALL), official_config(SMALL))
    target, real, refused = tmp_path / "own", stream.save_file, []
    if there:
        target.mkdir()

    def save(*args: Any, **kwargs: Any) -> None:
        with pytest.raises(OSError, match="another process is writing to this folder") as error:
            convert_folder(source, target, Options(quantize="nf4"))
        refused.append(error.value.filename)
        real(*args, **kwargs)

    monkeypatch.setattr(stream, "save_file", save)
    convert_folder(source, target)
    assert refused == [str(target)]
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors"]
    load_pretrained(target)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.skipif(not mounting_is_permitted(), reason="mounting is not permitted here")
def test_a_mount_point_is_written_to_and_a_full_one_is_left_empty(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "o", official_tensors(SMALL), official_config(SMALL))
    target = tmp_path / "mounted"
    target.mkdir()

    def convert(size: str) -> str:
        torch.set_num_threads(1)
        mount(target, size)
        (target / "lost+found").mkdir()
        try:
            convert_folder(source, target)
        except OSError as error:
            return f"{error.strerror} {sorted(os.listdir(target))}"
        return str(sorted(os.listdir(target)))

    names = "['config.json', 'lost+found', 'model.safetensors']"
    assert forked(lambda: convert("4m")) == (0, names)
    status, message = forked(lambda: convert("100k"))
    assert status == 0 and message.endswith("['lost+found']") and "free space" in message


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_limit_on_files_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "o", official_tensors(SMALL), official_config(SMALL))

    def limited() -> str:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            convert_folder(source, tmp_path / "own", Options())
        except OSError as error:
            return f"{error.strerror}"
        return "written"

    status, message = forked(limited)
    assert status == 0 and "to be possible" in message
    assert not (tmp_path / "own").exists()
