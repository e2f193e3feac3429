"""Generation: with and without cache, padded and alone, beams, static cache, a second turn."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_crayon_model import IMAGE, make_batch, make_model, row
from transformers import DynamicCache, StaticCache

MODES = ("attention", "projection")
# An untrained model would utter image tokens.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "max_new_tokens": 4,
    "min_new_tokens": 4,
    "suppress_tokens": [IMAGE],
}


def new_tokens(model: Any, batch: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    tokens = model.generate(**batch, **{**GREEDY, **options})
    return tokens[:, batch["input_ids"].shape[1] :]


@pytest.mark.parametrize("image_adapters", [(), ("plora",)])
@pytest.mark.parametrize("mode", MODES)
def test_cached_equals_uncached(mode: str, image_adapters: tuple[str, ...]) -> None:
    model = make_model(crayon_mode=mode, adapters=("plora", "vl"), image_adapters=image_adapters)
    batch = make_batch()
    assert torch.equal(new_tokens(model, batch), new_tokens(model, batch, use_cache=False))


@pytest.mark.parametrize("mode", MODES)
def test_the_crayon_changes_what_is_generated(mode: str) -> None:
    """Its effect lives in the cache: the tokens after the prefill depend on it."""
    model, batch = make_model(crayon_mode=mode), make_batch()
    out = model(**batch, use_cache=True)
    plain = {k: v for k, v in batch.items() if not k.startswith("crayon")}
    bare = model(**plain, use_cache=True)
    token, mask = (
        torch.tensor([[4], [4]]),
        torch.cat([batch["attention_mask"], torch.ones(2, 1)], 1),
    )
    steps = [
        model(token, attention_mask=mask, past_key_values=o.past_key_values).logits
        for o in (out, bare)
    ]
    assert not torch.allclose(steps[0], steps[1], atol=1e-3)
    whole = {
        **batch,
        "input_ids": torch.cat([batch["input_ids"], token], 1),
        "attention_mask": mask,
    }
    torch.testing.assert_close(steps[0], model(**whole).logits[:, -1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_left_padded_batch_equals_single_rows(mode: str) -> None:
    model, batch = make_model(crayon_mode=mode), make_batch()
    together = new_tokens(model, batch)
    for index, skip in ((0, 0), (1, 1)):
        assert torch.equal(new_tokens(model, row(batch, index, skip=skip))[0], together[index])


@pytest.mark.parametrize("mode", MODES)
def test_beams_equal_single_rows_and_uncached(mode: str) -> None:
    """Beams repeat every input along the batch: the rows of a sample travel with it."""
    model, batch = make_model(crayon_mode=mode), make_batch()
    together = new_tokens(model, batch, num_beams=3)
    assert torch.equal(together, new_tokens(model, batch, num_beams=3, use_cache=False))
    for index, skip in ((0, 0), (1, 1)):
        single = new_tokens(model, row(batch, index, skip=skip), num_beams=3)
        assert torch.equal(single[0], together[index])


def test_beams_of_a_sample_with_several_images() -> None:
    """transformers repeats pixel values image by image: beams would get two times the same one."""
    model = make_model()
    tokens = torch.tensor(
        [[1, *[IMAGE] * 4, 5, *[IMAGE] * 4, 6], [0, 0, 0, 0, 1, *[IMAGE] * 4, 6, 7]]
    )
    generator = torch.Generator().manual_seed(2)
    batch = {
        "input_ids": tokens,
        "attention_mask": (tokens != 0).long(),
        "pixel_values": 3 * torch.randn(3, 3, 8, 8, generator=generator),
        "crayon_index": torch.tensor([[0, 1, 1, 0, 2, 3, 3, 2], [0, 1, 1, 0, *[-1] * 4]]).int(),
        "crayon_class": torch.tensor([[0, 18, 0, 5], [0, 7, -1, -1]]).int(),
        "crayon_number": torch.tensor([[0, 1, 0, 1], [0, 1, 0, 0]]).int(),
    }
    expected = model(**batch).logits[:, -1].repeat_interleave(3, dim=0)
    options = {"num_beams": 3, "return_dict_in_generate": True, "output_logits": True}
    output: Any = model.generate(**batch, **{**GREEDY, **options})
    torch.testing.assert_close(output.logits[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_static_cache_equals_dynamic(mode: str) -> None:
    model, batch = make_model(crayon_mode=mode), make_batch()
    static = new_tokens(model, batch, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, new_tokens(model, batch))


@pytest.mark.parametrize("mode", MODES)
def test_a_decoded_token_is_one_graph_that_asks_for_no_value(mode: str) -> None:
    """A CUDA graph can hold it: a break or a value that is read would be a wait for each token."""
    model, batch = make_model(crayon_mode=mode), make_batch()
    cache = StaticCache(config=model.config.text_config, max_cache_len=16)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    with torch.no_grad():
        model(**batch, past_key_values=cache, use_cache=True)
        step = {"input_ids": torch.tensor([[5], [6]]), "use_cache": True}
        step["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones(2, 1).long()], 1)
        expected = model(**step, past_key_values=copy.deepcopy(cache)).logits
        compiled: Any = torch.compile(model.forward, backend=keep, fullgraph=True)
        torch.testing.assert_close(compiled(**step, past_key_values=cache).logits, expected)
    assert len(graphs) == 1
    asked = [node for node in graphs[0].graph.nodes if str(node.target) in ("item", "tolist")]
    assert not asked


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("give_image_again", [False, True])
def test_second_turn_on_a_filled_cache(mode: str, give_image_again: bool) -> None:
    """The image is in the cache; giving it again with the conversation does no harm."""
    model, first = make_model(crayon_mode=mode), row(make_batch(), 0)
    cache = DynamicCache(config=model.config.text_config)
    answer = model.generate(**first, **GREEDY, past_key_values=cache)
    talk = torch.cat([answer, torch.tensor([[5, 6, 8]])], dim=1)
    whole = {**first, "input_ids": talk, "attention_mask": torch.ones_like(talk)}
    again = whole if give_image_again else {k: whole[k] for k in ("input_ids", "attention_mask")}
    continued = model.generate(**again, **GREEDY, past_key_values=cache)
    assert torch.equal(continued, model.generate(**whole, **GREEDY))


@pytest.mark.parametrize("mode", MODES)
def test_second_turn_with_a_new_image(mode: str) -> None:
    """The crayon joins a prefill on a filled cache: prepared, added to the cache, SDPA."""
    model, batch = make_model(crayon_mode=mode), make_batch()
    one, two = row(batch, 0), row(batch, 1, skip=1)
    whole = {
        "input_ids": torch.cat([one["input_ids"], two["input_ids"]], 1),
        "pixel_values": batch["pixel_values"],
        "crayon_index": torch.cat(
            [
                one["crayon_index"],
                torch.where(two["crayon_index"] >= 0, two["crayon_index"] + 3, -1),
            ],
            1,
        ).int(),
        "crayon_class": torch.cat([one["crayon_class"], two["crayon_class"]], 1),
        "crayon_number": torch.cat([one["crayon_number"], two["crayon_number"]], 1),
    }
    expected = model(**whole).logits[:, 8:]
    cache = model(**one, use_cache=True).past_key_values
    two.pop("attention_mask")
    found = model(**two, past_key_values=cache).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_decoding_runs_no_crayon() -> None:
    """The prompt's table is made once, in the prefill."""
    model, batch = make_model(), make_batch()
    calls: list[int] = []
    mlp = model.model.crayon_prompt.mlp
    mlp.register_forward_hook(lambda *_: calls.append(1))
    new_tokens(model, batch)
    assert calls == [1]


def test_text_only_generation() -> None:
    model = make_model()
    tokens = torch.tensor([[1, 5, 6]])
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    assert torch.equal(new_tokens(model, batch), new_tokens(model, batch, use_cache=False))
