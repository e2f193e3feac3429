"""A stock model with the crayon and adapters added by plain hooks, one vector per token.

The slow, obvious way, which shares no code with the package but its parameters: what a patched
model must compute whatever was done to it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from collavo_kernels.ops.qlora_linear import NF4Weight

QKV = ("q_proj", "k_proj", "v_proj")
ATTENTION = (*QKV, "qkv_proj", "o_proj")
LINEARS = (*ATTENTION, "gate_proj", "up_proj", "gate_up_proj", "down_proj")


def layers_of(model: Any) -> Any:
    """Return the decoder layers of a model."""
    inner = model.model
    return (inner.language_model if hasattr(inner, "language_model") else inner.text_model).layers


def tokens_of(config: Any) -> list[int]:
    """Return the tokens that stand for places of images and videos."""
    names = ("image_token_id", "video_token_id")
    return [getattr(config, name) for name in names if getattr(config, name, None) is not None]


class StockWithCrayon:
    """Hooks on a stock model, with copies of a patched model's parameters.

    Args:
        stock: The untouched model; it is changed.
        patched: Where crayon, adapters and 4-bit weights come from.
        adapters: Names.
        image_adapters: Those of them for image tokens alone.
        scaling: The adapters' scaling.
    """

    def __init__(
        self,
        stock: Any,
        patched: Any,
        adapters: tuple[str, ...],
        image_adapters: tuple[str, ...],
        scaling: float,
    ) -> None:
        self.model = stock
        self.adapters, self.image_adapters, self.scaling = adapters, image_adapters, scaling
        self.crayon: dict[str, Tensor] = {}
        self.dense: Tensor | None = None
        self.images: Tensor | None = None
        # Where a prompt's embeddings have features merged in: they do not say so themselves.
        self.merged: Tensor | None = None
        self.decoded: list[tuple[nn.Linear, Tensor]] = []
        self._copy(patched)
        stock.model.register_forward_pre_hook(self._look, with_kwargs=True)
        for layer, source in zip(layers_of(stock), layers_of(patched), strict=True):
            for name in LINEARS:
                parent = layer.self_attn if name in ATTENTION else layer.mlp
                given = source.self_attn if name in ATTENTION else source.mlp
                if not hasattr(parent, name):
                    continue
                base = getattr(given, name).base()
                linear = getattr(parent, name)
                if isinstance(base, NF4Weight):
                    self.decoded.append((linear, base.dequantize(torch.float32)))
                linear.crayon_key = f"{layer.self_attn.layer_idx}.{name}"
                linear.register_forward_pre_hook(self._before)
                linear.register_forward_hook(self._after)

        self._decode(stock.dtype)

    def to(self, dtype: torch.dtype) -> None:
        """Cast the model; 4-bit weights are not rounded by it."""
        self.model.to(dtype)
        self.dense = None
        self._decode(dtype)

    def _decode(self, dtype: torch.dtype) -> None:
        for linear, weight in self.decoded:
            linear.weight.data = weight.to(dtype)

    def _copy(self, patched: Any) -> None:
        own: dict[str, nn.Parameter] = {}
        for name, value in patched.named_parameters():
            if "crayon_prompt" in name:
                own[name.split("crayon_prompt.")[1]] = value
            elif "lora_" in name or ".crayon_" in name:
                own[name.split("_model.layers.")[1]] = value
        self.names = {name: name.replace(".", "-") for name in own}
        copies = {self.names[n]: nn.Parameter(p.detach().clone()) for n, p in own.items()}
        self.model.extra = nn.ParameterDict(copies)
        self.prompt = patched.model.crayon_prompt is not None
        self.branches = any("crayon_qkv" in name for name in own)

    def of(self, name: str) -> nn.Parameter:
        """Return the copy of a parameter by its name below the layers or the prompt."""
        return self.model.extra[self.names[name]]

    def _look(self, module: Any, args: Any, inputs: dict[str, Any]) -> None:
        """Find the image tokens of a forward pass and the crayon's vector of each."""
        ids = inputs.get("input_ids")
        ids = ids if ids is not None else (args[0] if args else None)
        embeds = inputs.get("inputs_embeds")
        if embeds is not None and self.merged is not None:
            self.images = self.merged.repeat_interleave(len(embeds) // len(self.merged), 0)
        elif ids is None:
            found = [
                (embeds == module.get_input_embeddings()(torch.tensor(token))).all(-1)
                for token in tokens_of(module.config)
            ]
            self.images = torch.stack(found).any(0)
        else:
            self.images = torch.isin(ids, torch.tensor(tokens_of(module.config)))
        self.dense = None
        if self.crayon and self.prompt and bool(self.images.any()):
            self.dense = self._vectors(self.images)

    def _vectors(self, images: Tensor) -> Tensor:
        classes, numbers = self.of("class_embedding.weight"), self.of("number_embedding.weight")
        rows: list[Tensor] = []
        for sample, places in enumerate(images):
            own = sample // (len(images) // len(self.crayon["crayon_class"]))  # beams
            row, count = torch.full(places.shape, -1), int(places.sum())
            row[places] = self.crayon["crayon_index"][own][:count].long()
            row_class = self.crayon["crayon_class"][own].long()
            row_number = self.crayon["crayon_number"][own].long()
            x = classes[row_class[row].clamp_min(0)] + numbers[row_number[row].clamp_min(0)]
            x = nn.functional.linear(x, self.of("mlp.0.weight"), self.of("mlp.0.bias"))
            x = nn.functional.gelu(x)
            x = nn.functional.linear(x, self.of("mlp.2.weight"), self.of("mlp.2.bias"))
            rows.append(torch.where((row >= 0)[:, None], x, 0))
        return torch.stack(rows)

    def _before(self, linear: Any, args: tuple[Tensor]) -> Tensor | None:
        """Add the crayon to the input of q, k and v: attention mode."""
        name = linear.crayon_key.split(".")[1]
        if self.dense is None or self.branches or name not in (*QKV, "qkv_proj"):
            return None
        return args[0] + self.dense.to(args[0].dtype)

    def _after(self, linear: Any, args: tuple[Tensor], out: Tensor) -> Tensor:
        """Add the adapters' outputs and, in projection mode, the branches'."""
        layer, name = linear.crayon_key.split(".")
        group = "self_attn" if name in ATTENTION else "mlp"
        for adapter in self.adapters:
            a, b = (
                self.of(f"{layer}.{group}.{name}.lora_{side}.{adapter}.weight") for side in "AB"
            )
            x = nn.functional.linear(nn.functional.linear(args[0].to(a.dtype), a), b)
            x = x.to(out.dtype) * self.scaling
            if adapter in self.image_adapters:
                assert self.images is not None
                x = torch.where(self.images[..., None], x, 0)
            out = out + x
        branch = self._branch(layer, group, name)
        return out if branch is None else out + branch.to(out.dtype)

    def _branch(self, layer: str, group: str, name: str) -> Tensor | None:
        kinds = {
            "o_proj": ("crayon_o",),
            "gate_proj": ("crayon_gate",),
            "up_proj": ("crayon_up",),
            "gate_up_proj": ("crayon_gate", "crayon_up"),
        }
        if self.dense is None or not self.branches or name == "down_proj":
            return None
        outs = []
        for kind in kinds.get(name, ("crayon_qkv",)):
            a, b = (self.of(f"{layer}.{group}.{kind}.{side}.weight") for side in "AB")
            outs.append(nn.functional.linear(nn.functional.linear(self.dense.to(a.dtype), a), b))
        out = torch.cat(outs, -1)
        if name not in QKV:
            return out
        attention = layers_of(self.model)[int(layer)].self_attn
        sizes = [getattr(attention, n).out_features for n in QKV]
        return torch.split(out, sizes, -1)[QKV.index(name)]
