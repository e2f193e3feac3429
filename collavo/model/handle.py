"""What a patch did to a model, and the way back: modules, classes, attributes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple, cast

import collavo._requirements  # noqa: F401  (before what it checks)

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from collavo.model.layer import BRANCHES, MLP_BRANCHES, LayerSettings, decoder_linears
from collavo.model.peft_layers import is_peft_layer
from collavo_kernels.nn import ATTENTION_PROJECTIONS, DualQLoRALinear, has_own_forward


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

    def __init__(self, model: LlavaForConditionalGeneration, settings: LayerSettings) -> None:
        self.model = model
        self.settings = settings
        # Each with its original class and the mixin in front of it: by those it pickles.
        self._classes: list[tuple[nn.Module, type, type]] = []
        self._modules: list[_Replaced] = []
        self._made: list[nn.Module] = []
        self._attributes: list[tuple[nn.Module, str]] = []
        self._overridden: list[tuple[nn.Module, str, Any]] = []
        self._dtype = _dtype_of(model)
        self._trainable = [(p, p.requires_grad) for p in model.parameters()]
        self._applied = True

    def undo(self) -> LlavaForConditionalGeneration:
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
        dtype = _dtype_of(self.model)
        for layer, parent, name, original in reversed(self._modules):
            device = cast(torch.device, cast(Any, layer).input_layernorm.weight.device)
            cast_to = None if dtype == self._dtype else dtype
            _follow(original, getattr(parent, name), device, cast_to)
            setattr(parent, name, original.train(parent.training))
            for branch in MLP_BRANCHES:
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
        for parameter, flag in self._trainable:
            parameter.requires_grad_(flag)
        self._applied = False

    def added_state_dict(self) -> dict[str, Tensor]:
        """Return what was added, by its name in the model: crayon prompt, branches, adapters.

        ``model.load_state_dict(..., strict=False)`` on a model with the same settings takes it,
        ranks and scalings (``lora_scaling.<adapter>``) of adapters that were loaded included.

        Raises:
            ValueError: if one of them is offloaded.
        """
        parts = {"crayon_prompt", "lora_A", "lora_B", *BRANCHES}
        # Not from the state dict: it would bring every 4-bit weight into its saved order.
        named = dict(cast(nn.Module, self.model).named_parameters())
        added = {name: p.detach() for name, p in named.items() if parts & set(name.split("."))}
        for name, value in added.items():
            if value.is_meta:
                raise ValueError(
                    f"added_state_dict: {name} is offloaded and has no values here; take the hooks "
                    f"off first ({HOOKS_OFF})"
                )
        for name, module in cast(nn.Module, self.model).named_modules():
            if isinstance(module, DualQLoRALinear):
                added |= module.scaling_state_dict(f"{name}.")
        return added

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


HOOKS_OFF = "accelerate's: remove_hook_from_module(model, recurse=True) of accelerate.hooks"


def replaced_linears(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the linear layers of a decoder layer by name, and those inside of PEFT's layers.

    Args:
        layer: As it is before a patch.
    """
    for parent, name in decoder_linears(layer):
        linear = cast(nn.Module, getattr(parent, name))
        yield name, linear
        if is_peft_layer(linear):
            yield name, cast(nn.Module, linear.base_layer)


def _path_of(module: Any) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _dtype_of(model: Any) -> torch.dtype:
    """Return the dtype of a model, read where nothing is quantised and scripts upcast nothing."""
    return cast(torch.dtype, next(model.model.multi_modal_projector.parameters()).dtype)


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


@cache
def with_mixin(mixin: Any, original: Any) -> Any:
    """Return a class with a mixin in front, made once for each pair, whose instances pickle.

    Args:
        mixin: The class in front.
        original: The class whose name and module it has: transformers looks classes up by both.
    """
    body: Mapping[str, Any] = {
        "__module__": original.__module__,
        "__doc__": original.__doc__,
        "__reduce_ex__": _reduce_ex(mixin, original),
    }
    return type(original.__name__, (mixin, original), dict(body))


def _reduce_ex(mixin: type, original: type) -> Callable[[Any, Any], tuple[Any, ...]]:
    """Return what pickles an instance of ``with_mixin``'s class: no module has it by its name."""

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        parts = cast("tuple[Any, ...]", object.__reduce_ex__(self, max(2, protocol)))
        if type(self) is not with_mixin(mixin, original):  # a subclass, e.g. FSDP's
            return parts
        return (instance_with_mixin, (mixin, original), *parts[2:])

    return reduce


def instance_with_mixin(mixin: type, original: type) -> Any:
    """Return an instance of ``with_mixin``'s class without state: what a pickle starts from.

    Args:
        mixin: The class in front.
        original: The class behind it.
    """
    made = with_mixin(mixin, original)
    return made.__new__(made)
