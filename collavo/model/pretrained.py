"""Model folders in and out: loaded whole or refused before a weight is made, saved whole."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, cast

import collavo._requirements  # noqa: F401  (before what it checks)

import torch
from torch import nn
from transformers import GenerationConfig, PretrainedConfig
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from collavo.configuration import CollavoConfig, CollavoTextConfig, check_model_type
from collavo.model.files import (
    HUB_OPTIONS,
    StoredTensor,
    bytes_from_bitsandbytes,
    check_generation,
    fields_read,
    headers_of,
    local_folder,
    made_dense,
    read_headers,
    read_stored,
    sign_index,
    weight_patterns,
)
from collavo.model.inventory import check_tensors, expect_none, part_of
from collavo.model.linear import CollavoLinear
from collavo.writing import check_settled, written_folder

# Arguments of from_pretrained that a configuration has attributes of the same name as.
_ARGUMENTS = (
    "dtype",
    "torch_dtype",
    "attn_implementation",
    "experts_implementation",
    "fusion_config",
    "distributed_config",
)
_QUANTIZATION = ("quantization_config", "load_in_4bit", "load_in_8bit")


class SavedWhole:
    """Put before a model class of transformers: a save replaces a folder's model as a whole."""

    config: Any
    # What the model had before training made the trained part float32.
    dtype_at_rest: torch.dtype | None = None

    def resting_dtype(self) -> torch.dtype:
        """Return the dtype that a saved model is loaded in: that of what is not trained."""
        model = cast(Any, self)
        held = {parameter.dtype for parameter in model.parameters()}
        known = self.dtype_at_rest in held
        return cast(torch.dtype, self.dtype_at_rest if known else model.dtype)

    def save_pretrained(
        self,
        save_directory: str | PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        *,
        variant: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Save as transformers does, under the names that the model has.

        Files are written beside those that are there and replace them at the end, so a save that
        fails leaves the folder as it was; weights of an earlier save do not stay. What is pushed to
        the hub, or written by all processes together, is written in place.

        Args:
            save_directory: The folder.
            is_main_process: Whether this process writes.
            state_dict: As in transformers.
            push_to_hub: As in transformers.
            variant: As in transformers.
            **kwargs: As in transformers.
        """
        # transformers writes a LLaVA model under its old names; a checkpoint of those could not be
        # resumed, since loading a state dict does not translate.
        kwargs = {"save_original_format": False, "variant": variant, **kwargs}
        kwargs["state_dict"] = state_dict
        save = cast(Any, super()).save_pretrained
        config: Any = self.config
        self.config = self.saved_config()
        try:
            if push_to_hub or kwargs.get("distributed_checkpoint") or not is_main_process:
                kwargs |= {"is_main_process": is_main_process, "push_to_hub": push_to_hub}
                save(save_directory, **kwargs)
            else:
                with written_folder(save_directory, weight_patterns(variant)) as partial:
                    save(partial, **kwargs)
                    sign_index(partial, variant)
                    # transformers says the dtype of the first parameter.
                    dtype = str(self.resting_dtype()).removeprefix("torch.")
                    if str(self.config.dtype).removeprefix("torch.") != dtype:
                        self.config.dtype = dtype
                        self.config.save_pretrained(partial)
        except NotImplementedError as error:
            raise ValueError(
                f"save_pretrained: {error} Where the model has a device map of one place, "
                "transformers saves it from 5.15 on: install that, or load it without device_map"
            ) from error
        finally:
            self.config = config

    def saved_config(self) -> Any:
        """Return the configuration to save: of the model as it is now."""
        return self.config


class LoadedWhole:
    """Put before a model class of transformers: what does not fit is refused, never drawn."""

    config_class: Any
    # The configuration says it too; the tensors serve load_state_dict.
    _keys_to_ignore_on_load_unexpected: Any = [r"\.lora_scaling\."]  # noqa: RUF012

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any
    ) -> Any:
        """Load a model as transformers does, once its files have been found to fit.

        transformers draws at random what is missing, and warns. Here every tensor has to be there,
        in its shape, and no other. Only an adapter or a crayon that the arguments ask for and the
        folder's ``config.json`` does not have is drawn, and has no effect until it is trained.
        4-bit weights are read from bitsandbytes' layout. Linear layers with adapters come frozen,
        as they are where adapters are added.

        Args:
            pretrained_model_name_or_path: A folder or a hub id; None beside ``config`` and
                ``state_dict``.
            *model_args: As in transformers.
            **kwargs: As in transformers; settings of the configuration are taken too.

        Raises:
            FileNotFoundError: naming the file that is missing.
            ValueError: naming the tensors, the file or the setting that does not fit, or the way
                for folders of other models. No weight has been made then, unless ``device_map``
                offloads to the disk what would be drawn.
        """
        name, variant = pretrained_model_name_or_path, kwargs.get("variant")
        _refuse_arguments(name, kwargs)
        state, wants_info = kwargs.pop("state_dict", None), kwargs.pop("output_loading_info", False)
        own, config = _configurations(cls.config_class, name, kwargs)
        with fields_read(f"{name or 'config'}: {CONFIG_NAME}"):
            kind, config = cls.resolve(config)
        _refuse_settings(config)
        folder = None if name is None else local_folder(name, kwargs)
        with fields_read(f"{name or 'config'}: {CONFIG_NAME}"), torch.device("meta"):
            model = kind(copy.deepcopy(config), *model_args)  # takes no memory
        stored = headers_of(state) if folder is None else read_headers(folder, variant)
        check_generation(folder)
        stored = _as_named_in(model, stored)
        where, any_shape = str(name or "state_dict"), bool(kwargs.get("ignore_mismatched_sizes"))
        fresh = _fresh(model, stored, own)
        in_4_bits = check_tensors(model, stored, where=where, fresh=fresh, any_shape=any_shape)
        kwargs |= {"config": config, "output_loading_info": True}
        load = cast(Any, super(LoadedWhole, kind)).from_pretrained
        # transformers would put an adapter that lies beside the model on top of it.
        adapter = folder is not None and (folder / ADAPTER_CONFIG_NAME).is_file()
        if in_4_bits.kept or in_4_bits.dense or adapter or folder is None:
            tensors = made_dense(read_stored(stored), in_4_bits.dense)
            tensors, dtypes = bytes_from_bitsandbytes(tensors, in_4_bits.kept)
            loaded, info = load(None, *model_args, state_dict=tensors, **kwargs)
            _finish(loaded, name, folder, dtypes, kwargs.get("generation_config") is not None)
        else:
            loaded, info = load(name, *model_args, **kwargs)
        _expect_all(where, loaded, info["missing_keys"], fresh)
        _set_scalings(loaded, stored)
        _freeze_under_adapters(loaded)
        return (loaded, info) if wants_info else loaded

    @classmethod
    def resolve(cls, config: Any) -> tuple[Any, Any]:
        """Return the class to load, and its configuration.

        Args:
            config: Of ``config_class``.
        """
        return cls, config


def _refuse_arguments(name: Any, kwargs: dict[str, Any]) -> None:
    """Raise for what would load another model than the folder's."""
    state = kwargs.get("state_dict")
    if (name is None) == (state is None):
        given = "both" if state is not None else "neither"
        raise ValueError(f"state_dict: expected a folder, or config and state_dict, got {given}")
    for argument in _QUANTIZATION:
        _refuse_quantization(argument, kwargs.pop(argument, None))
    for argument in ("gguf_file", "key_mapping"):
        if kwargs.get(argument) is not None:
            raise ValueError(
                f"{argument}: expected None, got {kwargs[argument]!r}; a model folder is read as "
                "save_pretrained wrote it"
            )
    if kwargs.get("use_safetensors") is False:
        raise ValueError(
            "use_safetensors: expected None or True, got False; only safetensors files are read"
        )


def _refuse_quantization(argument: str, given: Any) -> None:
    """Raise if transformers is asked to quantise: it would leave the decoder dense."""
    if given is None or given is False:
        return
    facts = given.to_dict() if hasattr(given, "to_dict") else given
    named, kind = type(given).__name__, None
    if isinstance(facts, Mapping) and facts.get("load_in_4bit", facts.get("_load_in_4bit")):
        kind = facts.get("bnb_4bit_quant_type", "fp4")
        named = f"{named} with bnb_4bit_quant_type {kind!r}"
    fp4 = " ('fp4', BitsAndBytesConfig's default, is never read)" if kind == "fp4" else ""
    raise ValueError(
        f"{argument}: expected None, got {named}{fp4}; it would quantise the vision tower and not "
        "the decoder. Load the folder without it and call "
        "model.add_dual_qlora(adapters=(), quantize=True), which keeps the decoder in NF4 and sets "
        "config.quantize; what is saved then loads in 4 bits. A LLaVA that apply_to_llava changed "
        "is quantised by that call, before it is saved"
    )


def _configurations(config_class: Any, name: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Return the folder's configuration (None if it has none) and the one to load with.

    Takes ``config`` and the configuration's settings out of the arguments.
    """
    config = kwargs.pop("config", None)
    hub = {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
    own = None
    if name is not None and Path(name).is_dir():
        check_settled(local_folder(name, kwargs))
    # A hub id has one, and fetching it does not fetch the weights.
    if config is None or (name is not None and _has_config(name, kwargs)):
        own = config_class.from_pretrained(name, **hub)
    if config is None:
        config = own
    elif not isinstance(config, PretrainedConfig):
        config = config_class.from_pretrained(config, **hub)
    check_model_type(config.to_dict(), type(config).__name__, config_class.model_type)
    settings = [key for key in kwargs if hasattr(config, key) and key not in _ARGUMENTS]
    if settings:
        changes = {key: kwargs.pop(key) for key in settings}
        config = config_class.from_dict(config.to_dict(), **changes)
        config = config_class.from_dict(config.to_dict())  # what was set is checked
    return own, config


def _has_config(name: Any, kwargs: Mapping[str, Any]) -> bool:
    return not Path(name).is_dir() or (local_folder(name, kwargs) / CONFIG_NAME).is_file()


def _refuse_settings(config: PretrainedConfig) -> None:
    """Raise for settings by which transformers would load another model than the folder's."""
    parts = [value for value in vars(config).values() if isinstance(value, PretrainedConfig)]
    for part in (config, *parts):
        asked = getattr(part, "quantization_config", None)
        _refuse_quantization(f"{part.model_type}: quantization_config", asked)
    if getattr(config, "transformers_weights", None) is not None:
        raise ValueError(
            f"{config.model_type}: transformers_weights: expected none, got "
            f"{config.transformers_weights!r}; a model folder is read as save_pretrained wrote it"
        )


def _as_named_in(model: Any, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return a checkpoint's tensors by the model's names: one without a head has no prefix."""
    prefix = f"{model.base_model_prefix}."
    if hasattr(model, model.base_model_prefix) or not all(
        name.startswith((prefix, "lm_head.")) for name in stored
    ):
        return dict(stored)
    own = {name: entry for name, entry in stored.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): entry for name, entry in own.items()}


def _fresh(model: nn.Module, stored: Collection[str], own: Any) -> set[str]:
    """Return the tensors of parts that neither the checkpoint nor its configuration has."""
    parts: dict[str, list[str]] = {}
    for name in model.state_dict():
        if (part := part_of(name)) is not None:
            parts.setdefault(part, []).append(name)
    if own is not None and not isinstance(own, CollavoConfig | CollavoTextConfig):
        return set()
    has = set() if own is None else _parts_of(own)
    absent = [
        names for part, names in parts.items() if part not in has and not set(names) & set(stored)
    ]
    return {name for names in absent for name in names}


def _expect_all(where: str, model: nn.Module, missing: Iterable[str], fresh: set[str]) -> None:
    """Raise if tensors are missing, or if what was drawn is offloaded: disk has what a file has."""
    expect_none(where, "tensors are missing", set(missing) - fresh)
    for name, parameter in model.named_parameters():
        if name in fresh and parameter.is_meta:
            owner, _, own_name = name.rpartition(".")
            hook: Any = getattr(model.get_submodule(owner), "_hf_hook", None)
            if own_name not in (getattr(hook, "weights_map", None) or {}):
                raise ValueError(
                    f"device_map: offloads {name} to the disk, which {where} does not hold; load "
                    "the model without device_map, save it, and load that with it"
                )


def _parts_of(config: Any) -> set[str]:
    mode = config.crayon_mode
    crayon = {"attention": {"crayon prompt"}, "projection": {"crayon prompt", "crayon branches"}}
    return {f"adapter {name}" for name in config.adapters} | crayon.get(mode, set())


def _set_scalings(model: nn.Module, stored: Mapping[str, StoredTensor]) -> None:
    """Take scalings as they were: an alpha, divided by the rank, is now and then one ulp off."""
    for name, module in model.named_modules():
        if isinstance(module, CollavoLinear):
            for adapter in module.scaling:
                entry = stored.get(f"{name}.lora_scaling.{adapter}")
                if entry is not None:
                    module.scaling[adapter] = float(entry.read())


def _freeze_under_adapters(model: nn.Module) -> None:
    """Take the base of layers with adapters out of training: a file does not say what trains."""
    for module in model.modules():
        if isinstance(module, CollavoLinear) and module.lora_A:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)


def _finish(
    model: Any,
    name: Any,
    folder: Path | None,
    dtypes: Mapping[str, torch.dtype],
    generation_given: bool,
) -> None:
    """Do what transformers does for a folder and not for a state dict, and set 4-bit dtypes."""
    for key, module in model.named_modules():
        if isinstance(module, CollavoLinear) and module.quantized:
            module.base_dtype = dtypes.get(f"{key}.weight", module.base_dtype)
    if folder is None:
        return
    model.config.name_or_path = str(name)
    if (
        model.can_generate()
        and not generation_given
        and (folder / GENERATION_CONFIG_NAME).is_file()
    ):
        model.generation_config = GenerationConfig.from_pretrained(folder)
