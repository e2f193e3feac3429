"""What transformers before 5.5 has otherwise: how caches and attention modules are called."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn


class PositionedCache:
    """A cache of transformers before 5.5, called as later ones are: its updates ask for positions.

    Args:
        cache: The cache.
        position_embeddings: cos and sin; some caches rotate keys anew.
        cache_position: Places of the call's tokens, where the model sends them.
    """

    def __init__(
        self, cache: Any, position_embeddings: tuple[Tensor, Tensor], cache_position: Tensor | None
    ) -> None:
        self.cache = cache
        cos, sin = position_embeddings
        self.extras = {"cos": cos, "sin": sin}
        if cache_position is not None:
            self.extras["cache_position"] = cache_position

    def get_seq_length(self, layer_idx: int) -> int | Tensor:
        """Return the number of tokens in a layer's cache."""
        length: int | Tensor = self.cache.get_seq_length(layer_idx)
        return length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int | Tensor, int]:
        """Return the number of keys and the first one's place, of a cache that drops none."""
        return self.get_seq_length(layer_idx) + query_length, 0

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Store keys and values ``[B, G, S, D]``; return those to attend to."""
        stored: tuple[Tensor, Tensor] = self.cache.update(key, value, layer_idx, self.extras)
        return stored


def check_unmasked(queries: int, keys: int, past: int, key_range: Tensor | None) -> None:
    """Check that a call without a mask is one that models make: what it sees is clear then.

    They leave a mask out for a prefill, and for one token that sees all that the cache gives. These
    caches do not say which keys they dropped, and some not how many they have.

    Args:
        queries: S.
        keys: Number of keys that the cache gives.
        past: Number of tokens that it had.
        key_range: The padding, or None.

    Raises:
        ValueError: if it is another call.
    """
    seen = past + queries
    if (queries > 1 and past) or keys > seen or (key_range is not None and keys < seen):
        raise ValueError(
            f"attention_mask: expected a mask for {queries} token(s) on a cache that had {past} "
            f"and gives {keys} keys, got None; before transformers 5.5 a cache does not say more"
        )


class OwnRotary(nn.Module):
    """Put before ``CrayonAttention``: called as the attention of transformers 4.37 to 4.47 is.

    There it has the rotary embedding, gets positions, and gives its cache back as a third result.
    Masks have the sliding window in them, and are missing where none is needed.
    """

    rotary_emb: nn.Module
    sliding_window: int | None

    def take_rotary(self, rotary: nn.Module) -> None:
        """Take over the rotary embedding of a loaded module.

        Args:
            rotary: Gives cos and sin of positions ``[B or 1, S]``, or (transformers 4.37, and for
                some models later) those of all positions below a length.
        """
        self.rotary_emb = rotary
        self._window, self.sliding_window = self.sliding_window, None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_value: Any | None = None,
        output_attentions: bool = False,
        use_cache: bool = False,
        cache_position: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        crayon: Any | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Any | None]:
        """Return the output, None for the attention weights, and the cache.

        Args:
            hidden_states: ``[B, S, hidden_size]``.
            attention_mask: Additive ``[B, 1, S, keys]``, or None.
            position_ids: int64 ``[B or 1, S]``; not read beside ``position_embeddings``.
            past_key_value: A cache, or None.
            output_attentions: False.
            use_cache: Not read.
            cache_position: Places of the tokens in a static cache.
            position_embeddings: cos and sin, each ``[B or 1, S, D]``.
            crayon: ``CrayonInputs``, or None.
            **kwargs: As in ``CrayonAttention.forward``.

        Raises:
            ValueError: if attention weights are asked for, positions are missing, or
                ``crayon.fused`` leaves out masks that have a sliding window.
        """
        if output_attentions:
            raise ValueError(
                "output_attentions: expected False, got True; a CrayonAttention makes no weights"
            )
        if crayon is not None and crayon.fused and self._window is not None:
            raise ValueError(
                f"crayon.fused: expected None with a sliding window of {self._window}, got True; "
                "before transformers 4.48 the window is in the masks, which would not be read"
            )
        # In 4.38 to 4.40 a static cache hangs at the module, and 4.38 has a mask of all positions.
        past_key_value = getattr(self, "past_key_value", past_key_value)
        if attention_mask is not None and attention_mask.shape[-2] != hidden_states.shape[1]:
            attention_mask = attention_mask[..., cache_position, :]
        if position_embeddings is None:
            position_embeddings = self._angles(hidden_states, position_ids, past_key_value)
        out, weights = super().forward(
            hidden_states,
            position_embeddings,
            attention_mask,
            past_key_value,
            crayon,
            cache_position=cache_position,
            **kwargs,
        )
        return out, weights, past_key_value

    def _angles(
        self, hidden: Tensor, position_ids: Tensor | None, cache: Any | None
    ) -> tuple[Tensor, Tensor]:
        if position_ids is None:
            raise ValueError("position_ids: expected positions [B, S], got None")
        if "position_ids" in inspect.signature(type(self.rotary_emb).forward).parameters:
            cos, sin = self.rotary_emb(hidden, position_ids)
            return cos, sin
        length = hidden.shape[1]
        if cache is not None:
            length += int(cache.get_seq_length(self.layer_idx))
        cos, sin = self.rotary_emb(hidden, seq_len=length)
        return cos[position_ids], sin[position_ids]
