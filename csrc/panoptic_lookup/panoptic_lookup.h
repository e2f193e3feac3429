// From panoptic maps to the row of every grid cell, and the box and area of every row.
//
// The mathematics is in collavo_kernels/ops/panoptic_lookup/README.md. All results but the
// divisions of a box are integers, so they do not depend on how the work is cut.
#pragma once

#include <cstdint>

#include "common/cpu_features.h"

namespace collavo::panoptic_lookup {

// One map, as Python lays it out: IMAGE of collavo_kernels/ops/panoptic_lookup/inputs.py, field by
// field; a test compares where every field lies.
struct Image {
  const uint8_t* map;
  int64_t coloured;  // 0: int32 ids, values <= 0 mean no segment; 1: three bytes, COCO's colours
  int64_t height;
  int64_t width;
  int64_t stride;     // bytes from one pixel row to the next
  int64_t first_row;  // its first row of the batch, the unknown row
  int64_t rows;       // 1 + its segments
};

// What is known of a row after a part of a map: x1, y1 exclusive; x0 > x1 without a pixel.
struct RowFacts {
  int32_t area, x0, y0, x1, y1;
};

// Rows of cells [begin, end) of one image: a unit of parallel work with memory of its own.
struct Band {
  int64_t image;
  int64_t begin;
  int64_t end;
  RowFacts* facts;   // [rows]
  int32_t* counts;   // [rows]
  int32_t* touched;  // [rows]
};

struct Problem {
  const Image* images;
  int64_t num_images;
  const int32_t* row_ids;  // [T] segment id of each row: per image 0, then ascending ids
  int64_t grid_h;
  int64_t grid_w;
  bool majority;       // else nearest
  int32_t* row_index;  // [B, grid_h * grid_w]
  float* row_box;      // [T, 4]
  int32_t* row_area;   // [T]
};

COLLAVO_DECLARE_PER_ISA(
    // first_band[b] to first_band[b + 1] are the bands of image b; together they cover its cells.
    void forward(const Problem& problem, const Band* bands, const int64_t* first_band))

// Cuts the work into bands and runs them. isa: -1 for the best.
void forward(int isa, const Problem& problem);

}  // namespace collavo::panoptic_lookup
