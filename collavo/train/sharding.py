"""FSDP2: what it can shard, and a sharded model's whole state as ``save_pretrained`` writes it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

SHARDS_BYTES = "2.12"
"""The first torch that shards parameters of uint8, which 4-bit weights are."""


def replicated_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters that this version of torch cannot shard: bytes, before 2.12.

    Give them to ``fully_shard(..., ignored_params=...)``: every process then holds all of them.

    Args:
        model: A module that is to be sharded.

    Example:
        >>> replicated_parameters(nn.Linear(2, 1))
        set()
    """
    if torch.__version__ >= SHARDS_BYTES:  # compared as versions, not as strings
        return set()
    return {p for p in model.parameters() if not (p.is_floating_point() or p.is_complex())}


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Gather the state of a model that ``fully_shard`` has sharded.

    Every process has to call it; each gets the whole state, on the CPU. Torch's own
    ``get_model_state_dict`` looks every key up as an attribute, and the entries of a 4-bit weight
    (``weight.absmax`` ...) are none.

    Args:
        model: Sharded or not.

    Example:
        >>> list(full_state_dict(nn.Linear(2, 1, bias=False)))
        ['weight']
    """
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        state[name] = whole.detach().cpu()
    return state
