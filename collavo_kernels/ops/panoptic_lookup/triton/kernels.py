"""Triton kernels: one program per cell over the whole batch, then one small launch for the rows.

A program takes the smallest and the largest id of its cell. Where they are the same, which they
mostly are, it knows all the rest; otherwise it goes through the cell's ids in ascending order: each
turn counts one id's pixels and finds the next id, past any that are not listed; what is not counted
is unknown. Memory is read once, cache as often as there are ids. Sums over cells are integer
atomics, so their order does not show.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from collavo_kernels.ops.panoptic_lookup.inputs import IMAGE_FIELDS

NO_ID = tl.constexpr(2**31 - 1)
# Of a row: area, then the distances of the box's edges from the opposite sides.
FACTS = tl.constexpr(5)
# Where a map's facts stand in its line of the image table.
FIELDS = tl.constexpr(len(IMAGE_FIELDS))
MAP = tl.constexpr(IMAGE_FIELDS.index("map"))
COLOURED = tl.constexpr(IMAGE_FIELDS.index("coloured"))
HEIGHT = tl.constexpr(IMAGE_FIELDS.index("height"))
WIDTH = tl.constexpr(IMAGE_FIELDS.index("width"))
STRIDE = tl.constexpr(IMAGE_FIELDS.index("stride"))
FIRST_ROW = tl.constexpr(IMAGE_FIELDS.index("first_row"))
IMAGE_ROWS = tl.constexpr(IMAGE_FIELDS.index("rows"))


@triton.jit
def _place_of(row_ids, wanted, rows, STEPS: tl.constexpr):
    """Binary search: the last of the image's sorted row ids, 0 first, that is not above an id."""
    low = wanted * 0
    high = low + rows
    for _ in tl.static_range(STEPS):
        middle = low + (high - low) // 2
        not_above = tl.load(row_ids + middle) <= wanted
        low = tl.where(not_above, middle, low)
        high = tl.where(not_above, high, middle)
    return low


@triton.jit
def _row_of(row_ids, wanted, rows, STEPS: tl.constexpr):
    """Return the row of an id; 0, the unknown row, if it is not listed."""
    place = _place_of(row_ids, wanted, rows, STEPS)
    return tl.where(tl.load(row_ids + place) == wanted, place, 0)


@triton.jit
def _load_ids(pixels, coloured, at, x, inside):
    """Read ids from int32, or from three bytes of colour; "no segment" is 0."""
    if coloured != 0:
        pixel = pixels + at + 3 * x
        red = tl.load(pixel, mask=inside, other=0).to(tl.int32)
        green = tl.load(pixel + 1, mask=inside, other=0).to(tl.int32)
        blue = tl.load(pixel + 2, mask=inside, other=0).to(tl.int32)
        ids = red | (green << 8) | (blue << 16)
    else:
        word = (pixels + at + 4 * x).to(tl.pointer_type(tl.int32), bitcast=True)
        ids = tl.maximum(tl.load(word, mask=inside, other=0), 0)
    return ids


@triton.jit
def _add_facts(fact, area, from_right, from_bottom, right, bottom):
    if area > 0:
        tl.atomic_add(fact, area, sem="relaxed")
        tl.atomic_max(fact + 1, from_right, sem="relaxed")
        tl.atomic_max(fact + 2, from_bottom, sem="relaxed")
        tl.atomic_max(fact + 3, right, sem="relaxed")
        tl.atomic_max(fact + 4, bottom, sem="relaxed")


@triton.jit
def lookup_cells(
    images,  # [B, FIELDS] int64
    row_ids,  # [T] int32
    row_index,  # [B, grid_h * grid_w] int32
    facts,  # [T, 5] int32, zeros
    grid_h,
    grid_w,
    STEPS: tl.constexpr,
    MAJORITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one cell's row; add the pixels that belong to no other cell to their rows' facts."""
    program = tl.program_id(0)
    cells = grid_h * grid_w
    entry = images + program // cells * FIELDS
    cell = program % cells
    i = cell // grid_w
    j = cell % grid_w
    pixels = tl.load(entry + MAP).to(tl.pointer_type(tl.uint8))
    coloured = tl.load(entry + COLOURED).to(tl.int32)
    height = tl.load(entry + HEIGHT).to(tl.int32)
    width = tl.load(entry + WIDTH).to(tl.int32)
    stride = tl.load(entry + STRIDE)
    first_row = tl.load(entry + FIRST_ROW)
    rows = tl.load(entry + IMAGE_ROWS).to(tl.int32)
    ids_here = row_ids + first_row
    facts_here = facts + first_row * FACTS

    top = i * height // grid_h
    left = j * width // grid_w
    owned_bottom = (i + 1) * height // grid_h
    owned_right = (j + 1) * width // grid_w
    tall = ((i + 1) * height + grid_h - 1) // grid_h - top
    wide = ((j + 1) * width + grid_w - 1) // grid_w - left
    total = tall * wide

    if not MAJORITY:
        # At once, so that nothing of it has to be kept until the end.
        center_y = (2 * i + 1) * height // (2 * grid_h)
        center_x = (2 * j + 1) * width // (2 * grid_w) + tl.arange(0, 1)
        center = _load_ids(
            pixels, coloured, center_y.to(tl.int64) * stride, center_x, center_x >= 0
        )
        row = _row_of(ids_here, tl.max(center), rows, STEPS)
        tl.store(row_index + program, first_row.to(tl.int32) + row)

    smallest = NO_ID
    largest = 0
    start = 0
    while start < total:
        offset = start + tl.arange(0, BLOCK)
        inside = offset < total
        y = (top + offset // wide).to(tl.int64)
        ids = _load_ids(pixels, coloured, y * stride, left + offset % wide, inside)
        smallest = tl.minimum(smallest, tl.min(tl.where(inside, ids, NO_ID)))
        largest = tl.maximum(largest, tl.max(ids))
        start += BLOCK

    best = 0
    best_row = 0
    owned_total = (owned_bottom - top) * (owned_right - left)
    if smallest == largest:
        best_row = _row_of(ids_here, smallest, rows, STEPS)
        fact = facts_here + best_row * FACTS
        _add_facts(fact, owned_total, width - left, height - top, owned_right, owned_bottom)
    else:
        known = 0  # pixels of listed ids, and those of them that are no other cell's
        known_area = 0
        candidate = smallest
        while candidate <= largest:
            place = _place_of(ids_here, candidate, rows, STEPS)
            listed = (place > 0) & (tl.load(ids_here + place) == candidate)
            next_listed = tl.load(ids_here + place + 1, mask=place + 1 < rows, other=NO_ID)
            # After the largest int32 there is none: then this is the last turn.
            after = tl.where(listed, candidate + 1, next_listed)
            count = 0
            area = 0
            from_right = 0
            from_bottom = 0
            right = 0
            bottom = 0
            following = NO_ID
            start = 0
            while start < total:
                offset = start + tl.arange(0, BLOCK)
                inside = offset < total
                y = top + offset // wide
                x = left + offset % wide
                ids = _load_ids(pixels, coloured, y.to(tl.int64) * stride, x, inside)
                here = inside & listed & (ids == candidate)
                owned = here & (y < owned_bottom) & (x < owned_right)
                count += tl.sum(here.to(tl.int32))
                area += tl.sum(owned.to(tl.int32))
                from_right = tl.maximum(from_right, tl.max(tl.where(owned, width - x, 0)))
                from_bottom = tl.maximum(from_bottom, tl.max(tl.where(owned, height - y, 0)))
                right = tl.maximum(right, tl.max(tl.where(owned, x + 1, 0)))
                bottom = tl.maximum(bottom, tl.max(tl.where(owned, y + 1, 0)))
                later = inside & (ids >= after) & (ids > candidate)
                following = tl.minimum(following, tl.min(tl.where(later, ids, NO_ID)))
                start += BLOCK
            fact = facts_here + place * FACTS
            _add_facts(fact, area, from_right, from_bottom, right, bottom)
            known += count
            known_area += area
            better = count > best
            best = tl.where(better, count, best)
            best_row = tl.where(better, place, best_row)
            done = candidate == largest
            candidate = tl.where(done, largest, following)
            largest = tl.where(done, -1, largest)
        best_row = tl.where(total - known >= best, 0, best_row)
        # The unknown row has no box.
        _add_facts(facts_here, owned_total - known_area, 0, 0, 0, 0)

    if MAJORITY:
        tl.store(row_index + program, first_row.to(tl.int32) + best_row)


@triton.jit
def finish_rows(
    images,  # [B, FIELDS] int64
    columns,  # [4, T] int32: class, number, image, segment id
    facts,  # [T, 5] int32
    row_class,
    row_number,
    row_image,
    row_segment_id,
    row_box,  # [T, 4] float32
    row_area,
    total,
    ROWS: tl.constexpr,
):
    """Write every row's outputs; the box is divided here, once per edge and rounded correctly."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < total
    tl.store(row_class + row, tl.load(columns + row, mask=live, other=0), mask=live)
    tl.store(row_number + row, tl.load(columns + total + row, mask=live, other=0), mask=live)
    image = tl.load(columns + 2 * total + row, mask=live, other=0)
    segment = tl.load(columns + 3 * total + row, mask=live, other=0)
    tl.store(row_image + row, image, mask=live)
    tl.store(row_segment_id + row, segment, mask=live)
    fact = facts + row * FACTS
    area = tl.load(fact, mask=live, other=0)
    tl.store(row_area + row, area, mask=live)
    boxed = live & (segment > 0) & (area > 0)
    entry = images + image.to(tl.int64) * FIELDS
    height = tl.load(entry + HEIGHT, mask=live, other=1).to(tl.int32)
    width = tl.load(entry + WIDTH, mask=live, other=1).to(tl.int32)
    x0 = width - tl.load(fact + 1, mask=live, other=0)
    y0 = height - tl.load(fact + 2, mask=live, other=0)
    x1 = tl.load(fact + 3, mask=live, other=0)
    y1 = tl.load(fact + 4, mask=live, other=0)
    across = width.to(tl.float32)
    down = height.to(tl.float32)
    box = row_box + row * 4
    tl.store(box, tl.where(boxed, tl.div_rn(x0.to(tl.float32), across), 0.0), mask=live)
    tl.store(box + 1, tl.where(boxed, tl.div_rn(y0.to(tl.float32), down), 0.0), mask=live)
    tl.store(box + 2, tl.where(boxed, tl.div_rn(x1.to(tl.float32), across), 0.0), mask=live)
    tl.store(box + 3, tl.where(boxed, tl.div_rn(y1.to(tl.float32), down), 0.0), mask=live)
