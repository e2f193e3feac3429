"""``collavo info``: versions, devices and the backend of every operator, with reasons."""

from __future__ import annotations

from collavo_kernels.info import add_arguments, run

__all__ = ["add_arguments", "run"]
