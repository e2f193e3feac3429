"""CrayonPrompt: the table of rows equals the dense form per token, and dead rows stay dead."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from collavo_kernels import CrayonMap, panoptic_lookup
from collavo_kernels.nn import CrayonPrompt
from collavo_kernels.testing import assert_within_budget


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def example() -> CrayonMap:
    maps = torch.randint(0, 6, (3, 12, 12), dtype=torch.int32)
    ids = [ints([1, 2, 5]), ints([]), ints([3, 4])]
    classes = [ints([0, 4, 0]), ints([]), ints([-1, 6])]
    return panoptic_lookup(maps, ids, classes, grid=(6, 6), num_classes=7, max_number=3)


def prompt(dtype: torch.dtype = torch.float64, *, zero_init: bool = False) -> CrayonPrompt:
    made = CrayonPrompt(7, 3, 5, 8, zero_init=zero_init, dtype=dtype)
    for values in () if zero_init else made.parameters():
        torch.nn.init.normal_(values)
    return made


def dense(module: CrayonPrompt, crayon: CrayonMap) -> Tensor:
    """The form of the paper: look up, add and project at every cell, ``[B, P, hidden]``."""
    index = crayon.row_index.long()
    class_of_cell = crayon.row_class[index]
    number_of_cell = crayon.row_number[index]
    queries = module.class_embedding(class_of_cell) + module.number_embedding(number_of_cell)
    return module.mlp(queries)


def test_parameters_have_the_papers_sizes_and_the_released_codes_layout() -> None:
    module = CrayonPrompt(device="meta")
    shapes = {name: tuple(values.shape) for name, values in module.named_parameters()}
    assert shapes == {
        "class_embedding.weight": (134, 1024),
        "number_embedding.weight": (21, 1024),
        "mlp.0.weight": (4096, 1024),
        "mlp.0.bias": (4096,),
        "mlp.2.weight": (4096, 4096),
        "mlp.2.bias": (4096,),
    }


def test_table_and_dense_form_agree_forward_and_backward() -> None:
    crayon, module = example(), prompt()
    table = module(crayon)
    gathered = table[crayon.row_index.long()]
    expected = dense(module, crayon)
    assert table.shape == (crayon.num_rows, 8)
    torch.testing.assert_close(gathered, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(expected)
    parameters = list(module.parameters())
    ours = torch.autograd.grad((gathered * weights).sum(), parameters)
    theirs = torch.autograd.grad((expected * weights).sum(), parameters)
    for (name, _), a, b in zip(module.named_parameters(), ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=name)


def test_float32_is_within_the_budget() -> None:
    crayon, exact = example(), prompt()
    single = CrayonPrompt(7, 3, 5, 8, zero_init=False)
    single.load_state_dict(exact.state_dict())
    rounded = prompt()
    rounded.load_state_dict(single.state_dict())
    truth = dense(rounded, crayon)
    ours = single(crayon)[crayon.row_index.long()]
    assert_within_budget(ours, dense(single, crayon), truth)


def test_gradcheck() -> None:
    module = prompt()
    row_class, row_number = ints([0, 3, 7, -1]), ints([0, 1, 3, 0])
    names = [name for name, _ in module.named_parameters()]

    def project(*values: Tensor) -> Tensor:
        state = dict(zip(names, values, strict=True))
        return torch.func.functional_call(
            _Project(module),
            {f"module.{name}": value for name, value in state.items()},
            (row_class, row_number),
        )

    values = tuple(v.detach().clone().requires_grad_() for v in module.parameters())
    assert torch.autograd.gradcheck(project, values)


class _Project(torch.nn.Module):
    def __init__(self, module: CrayonPrompt) -> None:
        super().__init__()
        self.module = module

    def forward(self, row_class: Tensor, row_number: Tensor) -> Tensor:
        return self.module.project(row_class, row_number)


def test_dead_rows_are_zero_and_have_no_gradient() -> None:
    crayon, module = example(), prompt()
    table = module(crayon.pad(crayon.num_rows + 4))
    assert torch.equal(table[: crayon.num_rows], module(crayon))
    assert not table[crayon.num_rows :].any()
    table[crayon.num_rows :].sum().backward()
    for name, values in module.named_parameters():
        assert values.grad is not None and not values.grad.any(), name


def test_batch_first_rows_as_the_model_passes_them() -> None:
    module = prompt()
    row_class, row_number = ints([0, 3, 0, -1]).reshape(2, 2), ints([0, 1, 0, 9]).reshape(2, 2)
    vectors = module.project(row_class, row_number)
    assert vectors.shape == (2, 2, 8) and not vectors[1, 1].any()
    assert torch.equal(vectors[0, 0], vectors[1, 0])


def test_zero_rows() -> None:
    empty = panoptic_lookup(torch.zeros(0, 4, 4, dtype=torch.int32), [], [], grid=(2, 2))
    assert prompt()(empty).shape == (0, 8)


def test_zero_init_adds_nothing_at_first_and_learns() -> None:
    crayon, module = example(), prompt(zero_init=True)
    assert not module(crayon).any()
    target = torch.randn(crayon.num_rows, 8, dtype=torch.float64)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (module(crayon) - target).square().sum().backward()
        optimizer.step()
    # One factor of the path starts at zero, so everything before it learns from the second step.
    for name, values in module.named_parameters():
        assert values.grad is not None and values.grad.any(), name


def test_reset_parameters_starts_over() -> None:
    module = CrayonPrompt(133, 20, 64, 64)
    for values in module.parameters():
        torch.nn.init.constant_(values, 3.0)
    module.reset_parameters()
    for weight in (module.class_embedding.weight, module.number_embedding.weight):
        assert 0.018 < float(weight.detach().std()) < 0.022
    assert not module.mlp[0].bias.any()
    assert not module.mlp[2].weight.any() and not module.mlp[2].bias.any()
    assert CrayonPrompt(133, 20, 64, 64, zero_init=False).mlp[2].weight.any()


def test_compiles_in_one_graph() -> None:
    torch._dynamo.reset()
    crayon, module = example().pad(12), prompt()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(crayon), module(crayon), rtol=1e-12, atol=1e-12)


def test_state_dict_round_trip_is_bit_equal() -> None:
    crayon, module, other = example(), prompt(), prompt()
    assert not torch.equal(module(crayon), other(crayon))
    other.load_state_dict(module.state_dict())
    assert torch.equal(module(crayon), other(crayon))


def test_bad_input_is_named() -> None:
    module = prompt()
    with pytest.raises(ValueError, match="row_class: expected values from 0 to 7, got 8"):
        module.project(ints([8]), ints([1]))
    with pytest.raises(ValueError, match="row_number: expected values from 0 to 3, got 4"):
        module.project(ints([1]), ints([4]))
    with pytest.raises(ValueError, match="row_number: expected values from 0 to 3, got -1"):
        module.project(ints([1]), ints([-1]))
    with pytest.raises(ValueError, match=r"row_number: expected shape \[2\]"):
        module.project(ints([1, 1]), ints([1]))
    with pytest.raises(TypeError, match="row_class: expected dtype int32 or int64, got float32"):
        module.project(torch.zeros(2), ints([1, 1]))
    with pytest.raises(ValueError, match="hidden_size: expected at least 1, got 0"):
        CrayonPrompt(7, 3, 5, 0)
