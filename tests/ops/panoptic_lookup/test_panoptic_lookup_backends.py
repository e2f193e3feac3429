"""Every backend against the reference, and the reference against a naive oracle, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from collavo_kernels import panoptic_lookup
from collavo_kernels._native import ISA_CODES, native
from collavo_kernels.ops.panoptic_lookup import OPERATOR, cpu, reference
from collavo_kernels.ops.panoptic_lookup.inputs import REDUCTIONS, LookupResult
from collavo_kernels.testing import offset_view, poisoned_empty
from collavo_kernels.testing.cases.panoptic_lookup import (
    CASES,
    LARGE_CASES,
    Case,
    colours,
    ints,
    naive,
)

needs_native = pytest.mark.skipif(
    cpu.unavailable() is not None, reason=f"no compiled kernel: {cpu.unavailable()}"
)
ISAS = native().isas() if native() is not None else []
BACKENDS = ["reference", pytest.param("cpu", marks=needs_native)]


def assert_same(actual: LookupResult, expected: LookupResult) -> None:
    for name, ours, theirs in zip(LookupResult._fields, actual, expected, strict=True):
        assert ours.dtype == theirs.dtype, name
        assert torch.equal(ours, theirs), f"{name}: {ours.tolist()} != {theirs.tolist()}"


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_reference_is_what_the_readme_says(case: Case, reduce: str) -> None:
    expected = naive(case.maps(), case.segments, case.grid, reduce, case.max_number)
    assert_same(reference.forward(case.inputs(reduce)), expected)


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_instruction_set_gives_the_reference_bits(case: Case, reduce: str, isa: str) -> None:
    inputs = case.inputs(reduce)
    expected = reference.forward(inputs)
    with poisoned_empty():
        assert_same(cpu.forward(inputs, ISA_CODES[isa]), expected)


COLOURED = {name: case for name, case in CASES.items() if case.has_colours()}


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("case", COLOURED.values(), ids=COLOURED.keys())
def test_colours_are_read_as_their_ids(case: Case, reduce: str, isa: str) -> None:
    inputs = case.inputs(reduce, coloured=True)
    expected = reference.forward(case.inputs(reduce))
    assert_same(reference.forward(inputs), expected)
    with poisoned_empty():
        assert_same(cpu.forward(inputs, ISA_CODES[isa]), expected)


@needs_native
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("case", LARGE_CASES.values(), ids=LARGE_CASES.keys())
def test_large_maps_for_any_number_of_threads(case: Case, reduce: str, threads: None) -> None:
    inputs = case.inputs(reduce)
    expected = reference.forward(inputs)
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        assert_same(cpu.forward(inputs), expected)


@needs_native
def test_a_batch_of_many_maps_for_any_number_of_threads(threads: None) -> None:
    maps = torch.randint(0, 9, (11, 40, 30), dtype=torch.int32)
    pairs = [[(i, i % 2) for i in range(1, 1 + k % 8)] for k in range(11)]
    case = Case("threads take whole maps", lambda: list(maps), pairs, (6, 6))
    expected = reference.forward(case.inputs("majority"))
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        assert_same(cpu.forward(case.inputs("majority")), expected)


def _odd_views(maps: Tensor) -> dict[str, Tensor]:
    wide = torch.zeros(maps.shape[0], maps.shape[1], maps.shape[2] + 7, dtype=torch.int32)
    wide[:, :, 3:-4] = maps
    return {
        "pixels apart": offset_view(maps),
        "lines apart": wide[:, :, 3:-4],
        "transposed": maps.transpose(1, 2).contiguous().transpose(1, 2),
        "images interleaved": torch.stack([maps, maps * 0], 1)[:, 0],
        "batch last": maps.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_with_odd_offsets_and_strides(backend: str) -> None:
    maps = torch.randint(-1, 4, (3, 19, 23), dtype=torch.int32)
    ids, classes = [ints([1, 2, 3])] * 3, [ints([5, 5, -1])] * 3
    expected = panoptic_lookup(maps, ids, classes, grid=(4, 5), backend="reference")
    for name, view in _odd_views(maps).items():
        assert torch.equal(view, maps)
        # A list's items are such views too.
        for given_maps in (view, list(view)):
            got = panoptic_lookup(given_maps, ids, classes, grid=(4, 5), backend=backend)
            assert torch.equal(got.row_index, expected.row_index), name
            assert torch.equal(got.row_box, expected.row_box), name
            assert torch.equal(got.row_area, expected.row_area), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_colours_in_any_layout_and_beside_ids(backend: str) -> None:
    """Lines may lie anywhere; where pixels do too, channels first as decoders give them, or cut
    out of four channels, they are copied."""
    ids, classes = [ints([1, 70000])] * 2, [ints([5, -1])] * 2
    maps = torch.randint(0, 3, (2, 19, 23), dtype=torch.int32)
    maps = torch.where(maps == 2, 70000, maps)
    expected = panoptic_lookup(maps, ids, classes, grid=(4, 5), backend="reference")
    plain = colours(maps)
    wide = torch.zeros(2, 19, 30, 3, dtype=torch.uint8)
    wide[:, :, 3:-4] = plain
    layouts = {
        "lines apart": wide[:, :, 3:-4],
        "channels first": plain.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        "of four channels": torch.cat([plain, plain[..., :1]], -1)[..., :3],
        "odd offset": torch.cat([plain.flatten()[:1], plain.flatten()])[1:].view(plain.shape),
    }
    for name, view in layouts.items():
        for given_maps in (view, list(view), [maps[0], view[1]], [view[0], maps[1]]):
            got = panoptic_lookup(given_maps, ids, classes, grid=(4, 5), backend=backend)
            assert torch.equal(got.row_index, expected.row_index), name
            assert torch.equal(got.row_box, expected.row_box), name
            assert torch.equal(got.row_area, expected.row_area), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expanded_map_is_read_with_stride_zero(backend: str) -> None:
    line = ints([1, 1, 2, 0]).expand(2, 6, 4)
    ids, classes = [ints([1, 2])] * 2, [ints([0, 0])] * 2
    crayon = panoptic_lookup(line, ids, classes, grid=(2, 2), backend=backend)
    assert crayon.row_area.tolist() == [6, 12, 6] * 2
    assert crayon.row_index.tolist() == [[1, 0, 1, 0], [4, 3, 4, 3]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_zero_images(backend: str, reduce: str) -> None:
    none = torch.empty(0, 5, 5, dtype=torch.int32)
    for maps in (none, []):
        crayon = panoptic_lookup(maps, [], [], grid=(3, 4), backend=backend, reduce=reduce)
        assert crayon.row_index.shape == (0, 12) and crayon.row_box.shape == (0, 4)
        assert crayon.num_rows == 0 and crayon.row_index.dtype == torch.int32


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_input_is_not_written_to(backend: str) -> None:
    maps = torch.randint(-3, 4, (2, 9, 9), dtype=torch.int32)
    ids, classes = [ints([2, 1]), ints([3])], [ints([0, 1]), ints([-1])]
    before = [each.clone() for each in (maps, *ids, *classes)]
    panoptic_lookup(maps, ids, classes, grid=(3, 3), backend=backend)
    after = [maps, *ids, *classes]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_a_list_of_maps_gives_what_their_batch_gives() -> None:
    maps = torch.randint(-1, 4, (3, 20, 21), dtype=torch.int32)
    ids, classes = [ints([1, 3]), ints([]), ints([2])], [ints([0, 0]), ints([]), ints([9])]
    batch = panoptic_lookup(maps, ids, classes, grid=(5, 5))
    listed = panoptic_lookup(list(maps), ids, classes, grid=(5, 5))
    assert torch.equal(batch.row_index, listed.row_index)
    assert torch.equal(batch.row_box, listed.row_box)


@needs_native
def test_the_compiled_kernel_serves_the_cpu() -> None:
    inputs = CASES["ties"].inputs("majority")
    assert OPERATOR.select(inputs, "cpu").name == "cpu"
    assert OPERATOR.select(inputs, "mps").name == "reference"


def test_without_the_compiled_module_the_reference_serves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu, "native", lambda: None)
    monkeypatch.setattr(cpu, "native_reason", lambda: "it was not built")
    inputs = CASES["ties"].inputs("majority")
    assert OPERATOR.select(inputs, "cpu").name == "reference"
    with pytest.raises(ValueError, match=r"'cpu' cannot serve .* it was not built"):
        OPERATOR.select(inputs, "cpu", "cpu")


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Tensor], list[list[tuple[int, int]]], tuple[int, int]]:
    values = draw(st.lists(st.integers(-2, 12), min_size=1, max_size=6))
    maps, segments = [], []
    for _ in range(draw(st.integers(1, 3))):
        height, width = draw(st.integers(1, 14)), draw(st.integers(1, 14))
        pixels = draw(
            st.lists(st.sampled_from(values), min_size=height * width, max_size=height * width)
        )
        maps.append(ints(pixels).reshape(height, width))
        ids = draw(st.lists(st.integers(1, 14), unique=True, max_size=6))
        segments.append([(i, draw(st.integers(-1, 2))) for i in ids])
    return maps, segments, (draw(st.integers(1, 6)), draw(st.integers(1, 6)))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(problem=problems(), reduce=st.sampled_from(REDUCTIONS))
def test_any_small_problem_is_what_the_readme_says(
    problem: tuple[list[Tensor], list[list[tuple[int, int]]], tuple[int, int]], reduce: str
) -> None:
    maps, segments, grid = problem
    expected = naive(maps, segments, grid, reduce, max_number=2)
    ids = [ints([p[0] for p in each]) for each in segments]
    classes = [ints([p[1] for p in each]) for each in segments]
    for backend in ("reference", ""):
        got = panoptic_lookup(
            maps,
            ids,
            classes,
            grid=grid,
            num_classes=3,
            max_number=2,
            reduce=reduce,
            backend=backend,
        )
        fields = [getattr(got, name) for name in LookupResult._fields]
        assert_same(LookupResult(*fields), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("coloured", [False, True])
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("case", [*CASES.values(), *LARGE_CASES.values()])
def test_triton_gives_the_reference_bits_on_a_gpu(case: Case, reduce: str, coloured: bool) -> None:
    if coloured and not case.has_colours():
        pytest.skip("ids that are no colours")
    expected = reference.forward(case.inputs(reduce))
    maps = [(colours(each) if coloured else each).cuda() for each in case.maps()]
    torch.cuda.set_sync_debug_mode("error")  # nothing may wait for the device
    try:
        got = panoptic_lookup(
            maps,
            case.ids(),
            case.classes(),
            grid=case.grid,
            num_classes=case.num_classes,
            max_number=case.max_number,
            reduce=reduce,
            backend="triton",
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    fields = [getattr(got, name).cpu() for name in LookupResult._fields]
    assert_same(LookupResult(*fields), expected)
