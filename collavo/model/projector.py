"""The projector's tensors: their names here, and in LLaVA's own files."""

from __future__ import annotations

from collavo.configuration import PROJECTOR_TYPES

PROJECTOR_FILE = "mm_projector.bin"
OWN_PROJECTOR = "model.multi_modal_projector."
LLAVA_PROJECTOR = "model.mm_projector."
LLAVA_TOWER = "model.vision_tower.vision_tower."

# What LLaVA's own code numbers, a Sequential, is named in transformers'.
_LAYERS = {"mlp2x_gelu": {"linear_1.": "0.", "linear_2.": "2."}, "linear": {"": ""}}


def projector_names(projector_type: str, *, bias: bool = True) -> dict[str, str]:
    """Return LLaVA's own name of each tensor of the projector, as ``mm_projector.bin`` has it.

    Args:
        projector_type: As ``CollavoConfig.projector_type``.
        bias: Whether its layers have biases, as all of LLaVA's do
            (``config.multimodal_projector_bias``).

    Returns:
        By this package's name, which is transformers' too for ``"mlp2x_gelu"``.

    Raises:
        ValueError: for an unknown projector.

    Example:
        >>> projector_names("linear")["model.multi_modal_projector.weight"]
        'model.mm_projector.weight'
        >>> projector_names("mlp2x_gelu")["model.multi_modal_projector.linear_2.bias"]
        'model.mm_projector.2.bias'
    """
    if projector_type not in PROJECTOR_TYPES:
        raise ValueError(
            f"projector_type: expected one of {PROJECTOR_TYPES}, got {projector_type!r}"
        )
    return {
        f"{OWN_PROJECTOR}{own}{part}": f"{LLAVA_PROJECTOR}{original}{part}"
        for own, original in _LAYERS[projector_type].items()
        for part in (("weight", "bias") if bias else ("weight",))
    }
