"""The whole state of a sharded model, in the names and bytes that ``save_pretrained`` writes."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor


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
