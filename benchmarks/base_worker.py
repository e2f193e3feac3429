"""The other side of ``--base``: times rows of this tree's registry with another tree's packages.

``base.py`` starts it as ``python -m benchmarks.base_worker`` with the other tree first on the path.
It says where its package lies, then answers a line of JSON with a line of JSON::

    {"op": "qlora_linear", "row": "fwd-4096x4096/m1/r64-ours:cpu"}   {"ready": true}
    {"seconds": 0.04}                                                {"times": [0.00052, ...]}

or ``{"unavailable": reason}``, or ``{"error": reason}``. It ends with its input.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import torch

import collavo_kernels
from benchmarks import timing
from benchmarks.registry import BENCHMARKS, Call, Unavailable


class Worker:
    """Keeps the call that is being timed."""

    def __init__(self, kind: str, device: torch.device) -> None:
        self.kind, self.device = kind, device
        self.call: Call | None = None
        self.sampler: timing.Sampler | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to one request."""
        if "op" in request:
            self._prepare(request["op"], request["row"])
            return {"ready": True}
        if self.call is None or self.sampler is None:
            raise RuntimeError("asked for times before a row was named")
        with torch.set_grad_enabled(self.call.grad):
            return {"times": self.sampler.stretch(float(request["seconds"]))}

    def _prepare(self, op: str, name: str) -> None:
        self.call = self.sampler = None  # before another's memory is taken
        entry = BENCHMARKS[op]
        call = entry.prepare(entry.find(self.kind, name), self.device)
        with torch.set_grad_enabled(call.grad):
            self.sampler = timing.Sampler(
                call.run, self.device, capture=call.capture, before=call.before
            )
        self.call = call


@contextmanager
def answers() -> Iterator[TextIO]:
    """Keep what libraries print out of the answers: it goes where errors go."""
    with os.fdopen(os.dup(1), "w") as channel:
        os.dup2(2, 1)
        yield channel


def serve(worker: Worker, channel: TextIO) -> None:
    """Answer line by line until the input ends."""
    for line in sys.stdin:
        try:
            answer = worker.answer(json.loads(line))
        except Unavailable as reason:
            answer = {"unavailable": str(reason)}
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            answer = {"error": f"{type(error).__name__}: {first}"}
        print(json.dumps(answer), file=channel, flush=True)


def main() -> int:
    """Serve one process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.base_worker")
    parser.add_argument("--kind", required=True, choices=["cpu", "cuda"])
    parser.add_argument("--device", required=True)
    parser.add_argument("--threads", required=True, type=int)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with answers() as channel:
        print(json.dumps({"package": collavo_kernels.__file__}), file=channel, flush=True)
        serve(Worker(given.kind, torch.device(given.device)), channel)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
