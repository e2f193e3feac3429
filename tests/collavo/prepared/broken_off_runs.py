"""Run in a process of its own: prepare a folder again and again, killed at every file it renames.

``python broken_off_runs.py COCO OUT``: for every number n of renamed files a child process prepares
into ``OUT/<n>-before`` and ``OUT/<n>-after`` and kills itself with SIGKILL just before or just
after the n-th rename; another one then runs to its end. Prints how many runs were killed. Children
are forked, because importing torch takes longer than all the rest.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from collavo.panoptic import PrepareSettings, prepare_folder
from collavo.panoptic.coco_index import CocoFolder
from collavo.prepared import shards


def forked(work: Callable[[], object]) -> int:
    """Return what became of a child that does the work: 0, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(rename: int, after: bool, work: Callable[[], object]) -> Callable[[], object]:
    """Let the work kill its own process at its n-th rename."""

    def run() -> None:
        seen, real = 0, os.replace

        def replace(source: Path, target: Path) -> None:
            nonlocal seen
            seen += 1
            if seen == rename and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            real(source, target)
            if seen == rename:
                os.kill(os.getpid(), signal.SIGKILL)

        shards.os.replace = replace  # type: ignore[attr-defined]
        work()

    return run


def main(folder: Path, out: Path) -> None:
    """Kill at every place, and let each run go on."""
    coco = CocoFolder(folder / "images", folder / "panoptic", folder / "panoptic.json")
    settings = PrepareSettings(grid=(3, 4), images_per_shard=1)
    kills = 0
    for rename in range(1, 100):
        for after in (False, True):
            output = out / f"{rename}-{'after' if after else 'before'}"

            def work(output: Path = output) -> None:
                prepare_folder(coco, output, settings, workers=2)

            first = forked(killed_at(rename, after, work))
            if first == 0:
                print(kills)
                return
            if first != -signal.SIGKILL or forked(work) != 0:
                sys.exit(f"{output}: a run failed")
            kills += 1


main(Path(sys.argv[1]), Path(sys.argv[2]))
