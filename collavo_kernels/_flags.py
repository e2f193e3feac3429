"""Bad values that a GPU kernel met, remembered on the device and reported when asked.

A GPU kernel cannot raise without a host synchronisation. It treats a bad row index as -1 and an
inverted key range as empty, sets a bit in one int32 word per device, and goes on; ``check()``
reads the word and raises.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROW_INDEX_OUT_OF_RANGE = 1
KEY_RANGE_INVERTED = 2
CRAYON_INDEX_OUT_OF_RANGE = 4

_MESSAGES = {
    ROW_INDEX_OUT_OF_RANGE: "row_index: an entry lies outside the table; it was treated as -1",
    KEY_RANGE_INVERTED: "key_range: a range is inverted or leaves the sequence; it was clipped",
    CRAYON_INDEX_OUT_OF_RANGE: (
        "crayon_index: an entry is no row of its sample, or its sample has not as many image "
        "tokens; it was treated as -1"
    ),
}
_words: dict[torch.device, Tensor] = {}


def error_word(device: torch.device) -> Tensor:
    """Return the device's int32 word ``[1]`` that kernels set bits in, made at first use."""
    if device.index is None and device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    word = _words.get(device)
    if word is None:
        # One of two threads that come first together has its word kept, and both set bits in it.
        with torch.inference_mode(False):
            word = _words.setdefault(device, torch.zeros(1, dtype=torch.int32, device=device))
    return word


def check(device: torch.device | str | None = None) -> None:
    """Raise if a kernel met bad values since the last check, and clear the record.

    CPU backends raise at once and never need this. On a GPU it waits for the device, so call it
    where a wait does not matter: at the end of a step, or when results look wrong.

    Args:
        device: The device to look at; None looks at every device that an operator of this package
            has run on.

    Raises:
        ValueError: naming the argument whose values were bad.

    Example:
        >>> import collavo_kernels
        >>> collavo_kernels.check()
    """
    devices = list(_words) if device is None else [torch.device(device)]
    found: list[str] = []
    for each in devices:
        word = error_word(each)
        bits = int(word.item())
        if bits:
            word.zero_()
            found += [f"{text} (on {each})" for bit, text in _MESSAGES.items() if bits & bit]
    if found:
        raise ValueError("; ".join(found))
