"""What operators share: rows of tables, and the word in which GPU kernels leave bad values."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from collavo_kernels import _flags, check, quantize_nf4
from collavo_kernels._rows import add_rows, checked_index, sum_rows
from collavo_kernels.nn import checked_crayon_index

INDEX = torch.tensor([[-1, 0, 2], [2, 2, -1]], dtype=torch.int32)


@pytest.fixture(autouse=True)
def _no_words(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_flags, "_words", {})
    yield


def test_sums_run_in_token_order_and_unused_rows_are_zero() -> None:
    # 1e8 swallows a 1 that comes after it, and not one that comes before and is one of many.
    x = torch.tensor([[[7.0], [7.0], [1e8]], [[1.0], [-1e8], [7.0]]])
    assert torch.equal(sum_rows(x, INDEX, 4), torch.tensor([[7.0], [0.0], [0.0], [0.0]]))


@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("rows", [0, 2])
def test_sums_of_nothing(tokens: int, rows: int) -> None:
    index = torch.full((tokens,), -1, dtype=torch.int32)
    assert torch.equal(sum_rows(torch.randn(tokens, 5), index, rows), torch.zeros(rows, 5))


@pytest.mark.parametrize("rows", [0, 3])
def test_adding_makes_a_new_tensor(rows: int) -> None:
    """An operator's output must not be its input, even where no row exists."""
    x = torch.randn(2, 3, 4)
    index = INDEX if rows else torch.full_like(INDEX, -1)
    found = add_rows(x, torch.ones(rows, 4), index)
    assert found.data_ptr() != x.data_ptr()
    assert torch.equal(found, x + (index >= 0)[..., None])


def test_a_bad_row_is_named_with_its_place() -> None:
    with pytest.raises(ValueError, match=r"from -1 to 1 .* 2 rows\), got 2 at sample 0, token 2"):
        checked_index(INDEX, 2)
    with pytest.raises(ValueError, match="got 2 at token 3"):
        checked_index(INDEX.flatten()[[0, 1, 1, 2]], 1)


def test_a_bad_crayon_index_is_named_as_such() -> None:
    index = torch.tensor([[0, 1, -1], [0, 3, 0]])
    assert checked_crayon_index(index, 4) is index
    message = r"crayon_index: expected .* from -1 to 2 .* got 3 at sample 1, image token 1"
    with pytest.raises(ValueError, match=message):
        checked_crayon_index(index, 3)
    _flags.error_word(index.device).bitwise_or_(_flags.CRAYON_INDEX_OUT_OF_RANGE)
    with pytest.raises(ValueError, match=r"^crayon_index: an entry is no row of its sample"):
        check()


@pytest.mark.gpu
def test_a_gpu_names_a_bad_crayon_index_when_asked() -> None:
    index = torch.tensor([[0, 1, -1], [0, 3, 0]], device="cuda")
    assert checked_crayon_index(index, 3).tolist() == [[0, 1, -1], [0, -1, 0]]
    with pytest.raises(ValueError, match=r"^crayon_index: [^;]*$"):
        check()
    check()


def test_tensors_without_values_leave_no_word() -> None:
    """A model on "meta" or a fake GPU has no values to be bad, and check() must not trip on it."""
    checked_index(INDEX.to("meta"), 1)
    with FakeTensorMode():
        checked_index(torch.empty(2, 3, dtype=torch.int32, device="cuda"), 1)
    assert not _flags._words
    check()


def test_compiled_code_takes_a_bad_row_for_none() -> None:
    compiled = torch.compile(lambda index: checked_index(index, 2), fullgraph=True, backend="eager")
    assert compiled(INDEX).max() == 0


def test_check_names_what_was_bad_once() -> None:
    word = _flags.error_word(torch.device("cpu"))
    word |= _flags.ROW_INDEX_OUT_OF_RANGE | _flags.KEY_RANGE_INVERTED
    with pytest.raises(ValueError, match=r"row_index: .* \(on cpu\); key_range: .* \(on cpu\)"):
        check()
    check()
    check("cpu")


def test_a_word_made_in_inference_mode_serves_training() -> None:
    with torch.inference_mode():
        word = _flags.error_word(torch.device("cpu"))
    word.bitwise_or_(0)


def test_quantising_in_threads_gives_the_threads_back() -> None:
    # It takes torch's thread count down for a moment; two at once put back the other's 1.
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        work = [threading.Thread(target=quantize_nf4, args=(torch.randn(64, 256),)) for _ in "1234"]
        for each in work:
            each.start()
        for each in work:
            each.join()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
