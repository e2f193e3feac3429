"""Random things that users do to a patched model: it computes what the stock model does.

``python -m tests.fuzz.fuzz_patched_model --seconds 120 --seed 0`` runs until the time is over or a
case fails, and prints the case. A case is a tiny model of a random
family and decoder, patched with random settings, and a
few acts in a row (casts, copies, pickles, offload, training, undoing, ...); after each the model
answers a random question as a stock model does to which plain hooks add crayon and adapters
(``stock_crayon.py``), or refuses with a ``ValueError`` that is expected of the act.
"""

from __future__ import annotations

import argparse
import copy
import io
import random
import re
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import accelerate
import torch
import transformers
from accelerate.hooks import remove_hook_from_module
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.fuzz.patched_history import (
    DECODERS,
    FAMILIES,
    IMAGE,
    SCALING,
    SIZES,
    History,
    embeds_of,
    inputs_of,
    make_batch,
    make_stock,
)


def refused(act: Callable[[], Any], message: str) -> None:
    """Expect one clear error."""
    try:
        act()
    except ValueError as error:
        assert re.search(message, str(error)), f"expected {message!r}, got {error}"
        return
    raise AssertionError(f"expected a ValueError that matches {message!r}, got none")


# What users do. Each returns whether it was possible at all.


def cast(s: History) -> bool:
    """Another dtype for everything."""
    if s.hooked:
        return False
    s.dtype = s.rng.choice((torch.float32, torch.bfloat16, torch.float64))
    if s.dtype == torch.float64 and s.model.config.text_config._attn_implementation == "eager":
        s.dtype = torch.float32  # transformers' eager attention gives NaN for padding in float64
    for model in s.models():
        model.to(s.dtype)
    s.oracle.to(s.dtype)
    return True


def duplicate(s: History) -> bool:
    """A deep copy, or a pickle, of model and handle."""
    if s.hooked:
        return False
    if s.rng.random() < 0.5:
        s.model, s.handle = copy.deepcopy((s.model, s.handle))
    else:
        file = io.BytesIO()
        try:
            torch.save((s.model, s.handle), file)
        except AttributeError as error:
            # Hooks of transformers, there once a stock model has seen an image, do not pickle.
            assert "Can't pickle local object" in str(error), error
            return False
        file.seek(0)
        s.model, s.handle = torch.load(file, weights_only=False)
    return True


def offload(s: History) -> bool:
    """accelerate's offload to memory, to a folder, or by a device map."""
    if s.hooked:
        return False
    kind, folder = s.rng.randrange(3), tempfile.mkdtemp()
    if kind == 0:
        accelerate.cpu_offload(s.model, execution_device=torch.device("cpu"))
    elif kind == 1:
        accelerate.disk_offload(s.model, folder, execution_device=torch.device("cpu"))
    else:
        inner = s.model.model
        decoder = "text_model" if hasattr(inner, "text_model") else "language_model"
        own = {**inner._modules, **inner._parameters}
        parts = [f"model.{n}" for n, part in own.items() if part is not None and n != decoder]
        parts += [f"model.{decoder}.{n}" for n in ("embed_tokens", "norm", "rotary_emb")]
        parts += [f"model.{decoder}.layers.{i}" for i in range(2)]
        places = {part: s.rng.choice(("cpu", "disk")) for part in parts}
        accelerate.dispatch_model(s.model, places | {"lm_head": "disk"}, offload_dir=folder)
    s.hooked = True
    return True


def unhook(s: History) -> bool:
    """Take the hooks off again."""
    if not s.hooked:
        return False
    remove_hook_from_module(s.model, recurse=True)
    s.hooked = False
    return True


def undo(s: History) -> bool:
    """Undo, look at what is left, and patch again."""
    if s.hooked:
        refused(s.handle.undo, "undo: .* forward of its own instance; take it off")
        return True
    if s.dtype == torch.float64 and s.options["quantize"]:
        return False  # it could not be patched again: float64 is not quantised
    s.handle.undo()
    batch = make_batch(s.rng, 2, s.family)
    with torch.no_grad():
        found, expected = (m(**inputs_of(s, batch, False)).logits for m in (s.model, s.stock))
    assert torch.equal(found, expected), "undone: another model"
    state, other = s.model.state_dict(), s.stock.state_dict()
    assert list(state) == list(other), "undone: other tensors"
    assert all(state[n].dtype == other[n].dtype for n in state), "undone: other dtypes"
    s.patch()
    return True


def train(s: History) -> bool:
    """One backward, with either kind of checkpointing, and its gradients; then other weights."""
    if s.hooked or s.dtype == torch.bfloat16:
        return False
    kind = s.rng.choice((None, True, False))
    models = (s.model, s.oracle.model)
    batch = make_batch(s.rng, 2, s.family)
    inputs = inputs_of(s, batch, True) | {"labels": batch["input_ids"]}
    for model, reentrant in zip(models, (kind, False), strict=True):
        model.train()
        if kind is not None:  # what hooks bring in has no gradient under the re-entrant kind
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    models[0](**inputs).loss.backward()
    models[1](**{n: v for n, v in inputs.items() if not n.startswith("crayon")}).loss.backward()
    for name, parameter in s.model.named_parameters():
        key = re.sub(r"^model\.(\w+_model\.layers|crayon_prompt)\.", "", name)
        if key in s.oracle.names:
            own, expected = parameter.grad, s.oracle.of(key).grad
            found = torch.zeros_like(parameter) if own is None else own
            wanted = torch.zeros_like(parameter) if expected is None else expected
            torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-3, msg=f"grad of {name}")
    for model in models:
        model.gradient_checkpointing_disable()
        model.zero_grad(set_to_none=True)
        model.eval()
    s.oracle.dense = None  # its graph
    nudge(s)
    return True


def nudge(s: History) -> None:
    """Move weights as a step does, the same in every model: those that undo must keep."""
    state = dict(s.model.named_parameters())
    seed = s.rng.randrange(2**31)
    for model in s.models():
        generator = torch.Generator().manual_seed(seed)
        for full_name, parameter in model.named_parameters():
            name = full_name.replace(".base_layer", "")
            shared = name in state and state[name].is_floating_point() and "extra" not in name
            if shared and "crayon" not in name and "lora_" not in name:
                noise = torch.randn(parameter.shape, generator=generator) * 0.01
                parameter.data.add_(noise.to(parameter.dtype))


def reload(s: History) -> bool:
    """The model's own state dict, copied in or put in the place of what is there."""
    if s.hooked:
        return False
    state = {name: value.clone() for name, value in s.model.state_dict().items()}
    s.model.load_state_dict(state, assign=s.rng.random() < 0.5)
    s.model.tie_weights()  # torch parts what is tied when it puts tensors in the place
    return True


def attention(s: History) -> bool:
    """Another implementation of attention."""
    name = s.rng.choice(
        ("sdpa", "crayon") if s.dtype == torch.float64 else ("eager", "sdpa", "crayon")
    )
    for model in s.models():
        model.set_attn_implementation(name)
    return True


def mistake(s: History) -> bool:
    """A crayon of another grid; features merged in beside a crayon."""
    if not s.oracle.prompt:
        return False
    inputs = inputs_of(s, make_batch(s.rng, 2, s.family), True)
    wide = torch.zeros(2, 9, dtype=torch.int32)
    refused(lambda: s.model(**inputs | {"crayon_index": wide}), "crayon_index: sample . has")
    merged = embeds_of(s, inputs, merged=True)
    if bool((inputs["crayon_index"] >= 0).any()):
        refused(lambda: s.model(**merged), "(crayon_index|inputs_embeds): ")
    return True


ACTS = (cast, duplicate, offload, unhook, undo, train, reload, attention, mistake)


# What a model is asked.


def ask_logits(s: History, ask: Callable[[Any, dict[str, Any]], Tensor], batch: Any) -> None:
    """Compare logits with the oracle's: as near to those in float64 as its own, times eight."""
    crayon = s.rng.random() < 0.7
    inputs = inputs_of(s, batch, crayon)
    plain = {n: v for n, v in inputs.items() if not n.startswith("crayon")}
    exact = exact_oracle(s)
    with torch.no_grad():
        found, expected = ask(s.model, dict(inputs)), ask(s.oracle.model, dict(plain))
        truth = ask(exact.model, {n: to_double(v) for n, v in plain.items()})
    own = float((expected.double() - truth).abs().max())
    off = float((found.double() - truth).abs().max())
    budget = 8 * own + 32 * torch.finfo(s.dtype).eps * float(truth.abs().max())
    assert off <= budget, f"logits off by {off}, the stock model by {own}, crayon {crayon}"


def exact_oracle(s: History) -> Any:
    """Return the oracle in float64."""
    exact = copy.deepcopy(s.oracle)
    exact.model.set_attn_implementation("sdpa")
    exact.to(torch.float64)
    return exact


def to_double(value: Tensor) -> Tensor:
    """Return floating values in float64."""
    return value.double() if value.is_floating_point() else value


def forward(s: History) -> None:
    """Logits of a batch."""
    batch = make_batch(s.rng, 2, s.family)
    mask = batch["attention_mask"].bool()
    ask_logits(s, lambda model, inputs: model(**inputs).logits[mask], batch)


def forward_embeds(s: History) -> None:
    """Logits from the embeddings of the ids."""
    batch = make_batch(s.rng, 2, s.family)
    mask = batch["attention_mask"].bool()

    def ask(model: Any, inputs: dict[str, Any]) -> Tensor:
        ids = inputs.pop("input_ids")
        embeds = model.get_input_embeddings()(ids)
        return model(**inputs, inputs_embeds=embeds).logits[mask]

    ask_logits(s, ask, batch)


def outputs(s: History) -> None:
    """Hidden states and attention weights: as many, of the same shapes."""
    inputs = inputs_of(s, make_batch(s.rng, 2, s.family), False)
    with torch.no_grad():
        one, other = (
            m(**inputs, output_attentions=True, output_hidden_states=True)
            for m in (s.model, s.oracle.model)
        )
    for name in ("hidden_states", "attentions"):
        shapes = [[x.shape for x in getattr(each, name)] for each in (one, other)]
        assert shapes[0] == shapes[1], f"{name}: {shapes}"


def generated(s: History) -> None:
    """Answers in every way of generating; where two words are as good as equal, either."""
    rng = s.rng
    way: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [IMAGE]}
    ways = ("greedy", "beams", "static", "embeds", "uncached", "lookup", "assistant")
    # Assisted decoding sends tokens to the first weight's device, "meta" where it is offloaded.
    kind = rng.choice(ways[:-2] if s.hooked else ways)
    batch = make_batch(rng, 1 if kind in ("lookup", "assistant") else 2, s.family)
    inputs = inputs_of(s, batch, rng.random() < 0.7)
    way |= {
        "beams": {"num_beams": 2},
        "static": {"cache_implementation": "static", "disable_compile": True},
        "lookup": {"prompt_lookup_num_tokens": 2},
        "assistant": {"assistant_model": assistant(s)},
        "uncached": {"use_cache": False},
    }.get(kind, {})
    if kind == "embeds":
        inputs = embeds_of(s, inputs)
        way |= {"num_beams": rng.choice((1, 2))}
    plain = {n: v for n, v in inputs.items() if not n.startswith("crayon")}
    found = s.model.generate(**inputs, **way)
    expected = s.oracle.model.generate(**plain, **way)
    # In bfloat16 words that are as good as equal are decided by rounding; logits are compared.
    if s.dtype != torch.bfloat16 and not torch.equal(found, expected):
        s.oracle.crayon = {n: v for n, v in inputs.items() if n.startswith("crayon")}
        assert near_tie(s, plain, way), f"{kind}: {found.tolist()}, expected {expected.tolist()}"


def near_tie(s: History, plain: dict[str, Any], way: dict[str, Any]) -> bool:
    """Tell whether float64 answers otherwise than the stock model's own dtype: no one is right."""
    exact = exact_oracle(s)
    wide = {n: to_double(v) for n, v in plain.items()}
    if "assistant_model" in way:
        way = way | {"assistant_model": copy.deepcopy(way["assistant_model"]).double()}
    return not torch.equal(
        exact.model.generate(**wide, **way), s.oracle.model.generate(**plain, **way)
    )


def assistant(s: History) -> Any:
    """Return a model that guesses: a language model, or the stock model."""
    if s.rng.random() < 0.5:
        return copy.deepcopy(s.stock)
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval().to(s.dtype)


QUESTIONS = (forward, forward_embeds, outputs, generated)


def run(seed: int) -> list[str]:
    """Run one case; returns what was done.

    Raises:
        AssertionError: naming the case, if the model is not what it must be.
    """
    rng = random.Random(seed)
    adapters = rng.choice(((), ("a",), ("a", "b")))
    options: dict[str, Any] = {
        "crayon_mode": rng.choice(("attention", "projection", "none")),
        "crayon_rank": 4,
        "num_crayon_classes": 9,
        "max_crayon_number": 4,
        "adapters": adapters,
        "image_adapters": adapters[:1] if rng.random() < 0.3 else (),
        "lora_rank": 2,
        "lora_alpha": 2 * SCALING,
        "quantize": rng.choice((None, None, "nf4")),
    }
    family = rng.choice(tuple(FAMILIES))
    stock = make_stock(family, rng.randrange(len(DECODERS)), seed)
    history = History(rng, family, stock, options)
    history.patch()
    try:
        for _ in range(rng.randrange(1, 6)):
            act = rng.choice(ACTS)
            history.done.append(act.__name__)
            if act(history):
                question = rng.choice(QUESTIONS)
                history.done.append(question.__name__)
                question(history)
    except Exception as error:
        told = f"seed {seed}, {family}, {options}, {' -> '.join(history.done)}"
        raise AssertionError(f"{told}: {type(error).__name__}: {error}") from error
    return history.done


def run_cases(seed: int, *, seconds: float = 0.0, cases: int = 0) -> Counter[str]:
    """Run cases for a time, or a number of them; returns how often each thing was done."""
    transformers.logging.set_verbosity_error()
    done: Counter[str] = Counter()
    end, number, threads = time.monotonic() + seconds, 0, torch.get_num_threads()
    torch.set_num_threads(1)  # the models are tiny
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            while number < cases or time.monotonic() < end:
                done.update(["cases", *run(seed * 1_000_003 + number)])
                number += 1
    finally:
        torch.set_num_threads(threads)
    return done


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name, count in run_cases(args.seed, seconds=args.seconds).most_common():
        print(f"{count:6d} {name}")


if __name__ == "__main__":
    main()
