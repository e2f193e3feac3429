"""What a patch did to a model, and the way back: modules, classes, attributes."""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike
from typing import Any, NamedTuple, cast

import collavo._requirements  # noqa: F401  (before what it checks)

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from collavo.model.added import added_tensors, load_tensors, read_added, save_added
from collavo.model.families import dtype_of
from collavo.model.files import weight_patterns
from collavo.model.layer import (
    BRANCHES,
    HOOKS_OFF,
    LayerSettings,
    decoder_linears,
    name_in_decoder,
)
from collavo.model.peft_layers import is_peft_layer
from collavo.processing.processor import CollavoProcessor
from collavo.writing import written_folder
from collavo_kernels.nn import (
    ATTENTION_PROJECTIONS,
    DualQLoRALinear,
    has_own_forward,
    with_mixin,
)


class _Replaced(NamedTuple):
    """A module of a decoder layer that another one stands in for."""

    layer: nn.Module
    parent: nn.Module
    name: str
    original: nn.Module


class LlavaHandle:
    """What ``apply_to_llava`` changed, and the way back.

    Attributes:
        model: The model.
        settings: What its decoder layers were made to be.
    """

    def __init__(self, model: PreTrainedModel, settings: LayerSettings) -> None:
        self.model = model
        self.settings = settings
        # Each with its original class and the mixin in front of it: by those it pickles.
        self._classes: list[tuple[nn.Module, type, type]] = []
        self._modules: list[_Replaced] = []
        self._made: list[nn.Module] = []
        self._attributes: list[tuple[nn.Module, str]] = []
        self._overridden: list[tuple[nn.Module, str, Any]] = []
        self._dtype = dtype_of(model.model)
        self._before = [(p, p.dtype, p.requires_grad) for p in model.parameters()]
        self._applied = True

    def undo(self) -> PreTrainedModel:
        """Take the crayon and the adapters out again: the model is what it was, to the last bit.

        Classes, modules, their hooks and what requires a gradient come back as they were. Dense
        weights are shared while the crayon is in, so what training did to them stays; so do casts
        and moves of the model.

        Returns:
            The model.

        Raises:
            ValueError: if it has been undone before, or if something else changed the model in
                between and is still there (a device map's hooks, PEFT's layers, FSDP); nothing is
                undone then.
        """
        if not self._applied:
            raise ValueError(
                "undo: the model was restored before; apply_to_llava makes a new handle"
            )
        self._check()
        self.restore()
        return self.model

    def restore(self) -> None:
        """Put back what was there, whatever is there now; ``undo`` looks first."""
        cast_to = self._cast_to()
        for layer, parent, name, original in reversed(self._modules):
            device = cast(torch.device, cast(Any, layer).post_attention_layernorm.weight.device)
            _follow(original, getattr(parent, name), device, cast_to)
            setattr(parent, name, original.train(parent.training))
            for branch in BRANCHES:
                if hasattr(parent, branch):
                    delattr(parent, branch)
        for owner, name in self._attributes:
            delattr(owner, name)
        for owner, name, value in self._overridden:
            setattr(owner, name, value)
        for module, original_class, _ in self._classes:
            module.__class__ = original_class
            # Accelerate's hooks, taken off, leave the method that they found.
            module.__dict__.pop("forward", None)
        for parameter, _, flag in self._before:
            parameter.requires_grad_(flag)
        self._applied = False

    def _cast_to(self) -> torch.dtype | None:
        """Return the dtype that the model was cast to, if it was: training casts a part of it."""
        held = {id(parameter) for parameter in self.model.parameters()}
        kept = [
            p.dtype == own for p, own, _ in self._before if own == self._dtype and id(p) in held
        ]
        return None if any(kept) else dtype_of(self.model.model)

    def added_state_dict(self) -> dict[str, Tensor]:
        """Return what was added, by its name in the model: crayon prompt, branches, adapters.

        ``model.load_state_dict(..., strict=False)`` on a model with the same settings takes it,
        ranks and scalings (``lora_scaling.<adapter>``) of adapters that were loaded included.

        Raises:
            ValueError: if one of them is offloaded.
        """
        return added_tensors(cast(nn.Module, self.model))

    def save_pretrained(
        self, folder: str | PathLike[str], processor: CollavoProcessor | None = None, **kwargs: Any
    ) -> None:
        """Save the model as it is now, with crayon, adapters and 4 bits, into a CoLLaVO folder.

        ``collavo.load_pretrained`` reads it, and with a processor beside the model ``load_folder``,
        ``collavo chat``, ``eval`` and ``train``. Files take their places together at the end.

        Args:
            folder: The folder.
            processor: Saved into it too; None leaves the one that is there.
            **kwargs: As in transformers' ``save_pretrained``.

        Raises:
            TypeError: if the processor is another one, which those commands could not use.
            ValueError: if the model was restored, or holds what could not be loaded again.
        """
        self._expect_applied("save_pretrained")
        if processor is not None and not isinstance(processor, CollavoProcessor):
            raise TypeError(
                f"processor: expected a CollavoProcessor, got {type(processor).__name__}; make "
                "one around it"
            )
        save: Any = self.model.save_pretrained
        if processor is None:
            save(folder, **kwargs)
            return
        with written_folder(folder, weight_patterns(kwargs.get("variant"))) as partial:
            save(partial, **kwargs)
            processor.save_pretrained(partial)

    def save_added(self, folder: str | PathLike[str]) -> None:
        """Save crayon, branches and adapters alone, with settings, ranks and scalings.

        ``load_added`` of a handle, or ``collavo.load_added`` of the model before it is patched,
        brings them back, bit for bit.

        Args:
            folder: Made if needed; gets ``collavo_added.safetensors`` and ``collavo_added.json``.

        Raises:
            ValueError: if the model was restored, or the additions are offloaded.
        """
        self._expect_applied("save_added")
        save_added(self.model, folder)

    def load_added(self, folder: str | PathLike[str]) -> None:
        """Load what ``save_added`` wrote; ranks and scalings are the file's then.

        Args:
            folder: The folder.

        Raises:
            FileNotFoundError: naming the file that is missing.
            ValueError: naming what does not fit, before anything changes: a file that is damaged,
                settings of another kind, or a model that the additions do not belong to.
        """
        self._expect_applied("load_added")
        load_tensors(self.model, *read_added(folder))

    def _expect_applied(self, method: str) -> None:
        if not self._applied:
            raise ValueError(
                f"{method}: the model was restored and has nothing of this handle's; "
                "apply_to_llava makes a new one"
            )

    def keep(self, layer: nn.Module, parent: nn.Module, name: str) -> None:
        """Remember a module of a decoder layer that is about to be replaced.

        Args:
            layer: The decoder layer.
            parent: The module that has it.
            name: As an attribute of ``parent``.
        """
        original = cast(nn.Module, getattr(parent, name))
        self._modules.append(_Replaced(layer, parent, name, original))

    def replaced(self) -> None:
        """Say that all modules that are kept have been replaced: later changes are not ours."""
        self._made = [getattr(each.parent, each.name) for each in self._modules]

    def reclass(self, module: nn.Module, mixin: type) -> None:
        """Put a mixin in front of a module's class.

        Args:
            module: Any.
            mixin: A class.
        """
        original = type(module)
        module.__class__ = with_mixin(cast(Any, mixin), cast(Any, original))
        self._classes.append((module, original, mixin))

    def attach(self, owner: nn.Module, **values: Any) -> None:
        """Set attributes that ``undo`` deletes.

        Args:
            owner: The module that gets them.
            **values: Attributes by name.
        """
        for name, value in values.items():
            setattr(owner, name, value)
            self._attributes.append((owner, name))

    def override(self, owner: nn.Module, name: str, value: Any) -> None:
        """Set an attribute of a module that ``undo`` sets back.

        Args:
            owner: The module that has it.
            name: Its name.
            value: What it is until then.
        """
        self._overridden.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def _check(self) -> None:
        """Raise unless everything that was put in is still there, and nothing around it."""
        names = {id(m): name or "model" for name, m in cast(nn.Module, self.model).named_modules()}
        for (_, parent, name, _), made in zip(self._modules, self._made, strict=True):
            there = getattr(parent, name, None)
            if there is not made:
                where = f"{names.get(id(parent), type(parent).__name__)}.{name}"
                raise ValueError(
                    f"undo: {where} is now a {_path_of(there)}, which apply_to_llava did not put "
                    "there; take it off first (PEFT: unload() or merge_and_unload())"
                )
        for module, original, mixin in self._classes:
            if type(module) is not with_mixin(mixin, original):
                raise ValueError(
                    f"undo: {names.get(id(module), original.__name__)} is now a "
                    f"{_path_of(module)}, which apply_to_llava did not make it; undo before "
                    "sharding or wrapping the model"
                )
        for owner, name in self._attributes:
            if name not in {**vars(owner), **owner._modules}:
                where = names.get(id(owner), type(owner).__name__)
                raise ValueError(f"undo: {where}.{name} was deleted; set it again, None will do")
        parts = [module for module, *_ in self._classes]
        parts += [part for made in self._made for part in made.modules()]
        for module in parts:
            if has_own_forward(module):
                raise ValueError(
                    f"undo: {names.get(id(module), type(module).__name__)} has a forward of its "
                    f"own instance; take it off first ({HOOKS_OFF})"
                )


def replaced_linears(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield a decoder layer's linear layers and those inside of PEFT's, each with its name.

    Args:
        layer: As it is before a patch.
    """
    for parent, name in decoder_linears(layer):
        linear, full_name = cast(nn.Module, getattr(parent, name)), name_in_decoder(layer, name)
        yield full_name, linear
        if is_peft_layer(linear):
            yield full_name, cast(nn.Module, linear.base_layer)


def _path_of(module: Any) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _follow(
    original: nn.Module, made: nn.Module, device: torch.device, dtype: torch.dtype | None
) -> None:
    """Bring a linear layer, or an attention's, to what became of the one that stood in for it."""
    if made is original:
        return
    if isinstance(made, DualQLoRALinear):
        _follow_linear(original, made, device, dtype)
        return
    original._is_full_backward_hook = made._is_full_backward_hook
    for name in ATTENTION_PROJECTIONS:
        _follow(getattr(original, name), getattr(made, name), device, dtype)


def _follow_linear(
    original: nn.Module, made: DualQLoRALinear, device: torch.device, dtype: torch.dtype | None
) -> None:
    base: Any = original.base_layer if is_peft_layer(original) else original
    shared: set[int] = set()
    if made.weight_scales is None and type(base) is nn.Linear:
        # Shared when it was made; a cast or a move gave it memory of its own.
        base.weight.data = made.weight.data
        shared.add(id(base.weight))
    if base.bias is not None and made.bias is not None:
        base.bias.data = made.bias.data
        shared.add(id(base.bias))
    if any(value.device != device for value in original.parameters()):
        original.to(device)
    # What is not shared: a weight that was quantised, PEFT's adapters; never 4-bit codes.
    for parameter in original.parameters():
        own = id(parameter) not in shared and type(parameter) is nn.Parameter
        if own and dtype is not None and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
