// The pass over the maps. Maps are piecewise constant, so the unit of work is a run of equal ids in
// a pixel row of a cell: one look-up, one addition to the cell's count, one to the row's box.

#include <cstdint>
#include <limits>

#include "common/parallel.h"
#include "panoptic_lookup/panoptic_lookup.h"

namespace collavo::panoptic_lookup::COLLAVO_ISA {

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif

// Where the run of the id at x ends; the inner loop is one comparison of kLanes pixels.
inline int64_t run_end(const int32_t* line, int64_t x, int64_t end) {
  const int32_t id = line[x];
  for (++x; x + kLanes <= end; x += kLanes) {
    int32_t different = 0;
    for (int lane = 0; lane < kLanes; ++lane) different |= line[x + lane] ^ id;
    if (different != 0) break;
  }
  while (x < end && line[x] == id) ++x;
  return x;
}

// Finds the row of an id within its image: a binary search behind a small direct-mapped cache.
class RowFinder {
 public:
  RowFinder(const int32_t* ids, int64_t rows) : ids_(ids), rows_(rows) {}

  int64_t find(int32_t id) {
    if (id <= 0) return 0;
    const int slot = id & (kSlots - 1);
    if (cached_id_[slot] != id) {
      cached_id_[slot] = id;
      cached_row_[slot] = search(id);
    }
    return cached_row_[slot];
  }

 private:
  static constexpr int kSlots = 64;

  int64_t search(int32_t id) const {
    int64_t low = 0, high = rows_;  // ids_[low] <= id < ids_[high]
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (ids_[middle] <= id ? low : high) = middle;
    }
    return ids_[low] == id ? low : 0;
  }

  const int32_t* ids_;
  int64_t rows_;
  int32_t cached_id_[kSlots] = {};  // 0 is no id that is looked for
  int64_t cached_row_[kSlots] = {};
};

struct Span {
  int64_t begin;
  int64_t end;
};

// The pixels of a cell, and those of them that are no other cell's: the latter cut the axis.
inline Span cell_span(int64_t cell, int64_t length, int64_t cells) {
  return {cell * length / cells, ((cell + 1) * length + cells - 1) / cells};
}

inline Span owned_span(int64_t cell, int64_t length, int64_t cells) {
  return {cell * length / cells, (cell + 1) * length / cells};
}

inline int64_t cell_center(int64_t cell, int64_t length, int64_t cells) {
  return (2 * cell + 1) * length / (2 * cells);
}

inline void add_run(RowFacts& facts, int64_t begin, int64_t end, int64_t y) {
  if (begin >= end) return;
  const int32_t x0 = static_cast<int32_t>(begin), x1 = static_cast<int32_t>(end);
  const int32_t y0 = static_cast<int32_t>(y), y1 = y0 + 1;
  facts.area += x1 - x0;
  if (x0 < facts.x0) facts.x0 = x0;
  if (y0 < facts.y0) facts.y0 = y0;
  if (x1 > facts.x1) facts.x1 = x1;
  if (y1 > facts.y1) facts.y1 = y1;
}

inline int64_t larger(int64_t a, int64_t b) {
  return a > b ? a : b;
}

inline int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

class BandPass {
 public:
  BandPass(const Problem& problem, const Band& band)
      : problem_(problem),
        image_(problem.images[band.image]),
        band_(band),
        finder_(problem.row_ids + image_.first_row, image_.rows) {
    constexpr int32_t far = std::numeric_limits<int32_t>::max();
    for (int64_t row = 0; row < image_.rows; ++row) {
      band_.facts[row] = {0, far, far, 0, 0};
      band_.counts[row] = 0;
    }
  }

  void run() {
    int32_t* out = problem_.row_index + band_.image * problem_.grid_h * problem_.grid_w;
    for (int64_t i = band_.begin; i < band_.end; ++i) {
      int32_t* cells = out + i * problem_.grid_w;
      problem_.majority ? majority_line(i, cells) : nearest_line(i, cells);
    }
  }

 private:
  void majority_line(int64_t i, int32_t* cells) {
    const Span rows = cell_span(i, image_.height, problem_.grid_h);
    const Span owned_rows = owned_span(i, image_.height, problem_.grid_h);
    for (int64_t j = 0; j < problem_.grid_w; ++j) {
      const Span columns = cell_span(j, image_.width, problem_.grid_w);
      Span owned = owned_span(j, image_.width, problem_.grid_w);
      num_touched_ = 0;
      for (int64_t y = rows.begin; y < rows.end; ++y) {
        if (y >= owned_rows.end) owned = {0, 0};
        count_line(y, columns, owned);
      }
      cells[j] = static_cast<int32_t>(image_.first_row + take_majority());
    }
  }

  void count_line(int64_t y, Span columns, Span owned) {
    const int32_t* line = image_.map + y * image_.stride;
    for (int64_t x = columns.begin; x < columns.end;) {
      const int64_t end = run_end(line, x, columns.end);
      const int64_t row = finder_.find(line[x]);
      int32_t& count = band_.counts[row];
      if (count == 0) band_.touched[num_touched_++] = static_cast<int32_t>(row);
      count += static_cast<int32_t>(end - x);
      add_run(band_.facts[row], larger(x, owned.begin), smaller(end, owned.end), y);
      x = end;
    }
  }

  // The row with most pixels, the lowest of several; clears the counts for the next cell.
  int64_t take_majority() {
    int32_t best = 0;
    int64_t best_row = 0;
    for (int64_t k = 0; k < num_touched_; ++k) {
      const int32_t row = band_.touched[k], count = band_.counts[row];
      band_.counts[row] = 0;
      if (count > best || (count == best && row < best_row)) {
        best = count;
        best_row = row;
      }
    }
    return best_row;
  }

  void nearest_line(int64_t i, int32_t* cells) {
    const Span rows = owned_span(i, image_.height, problem_.grid_h);
    for (int64_t y = rows.begin; y < rows.end; ++y) {
      const int32_t* line = image_.map + y * image_.stride;
      for (int64_t x = 0; x < image_.width;) {
        const int64_t end = run_end(line, x, image_.width);
        add_run(band_.facts[finder_.find(line[x])], x, end, y);
        x = end;
      }
    }
    const int64_t y = cell_center(i, image_.height, problem_.grid_h);
    const int32_t* line = image_.map + y * image_.stride;
    for (int64_t j = 0; j < problem_.grid_w; ++j) {
      const int64_t x = cell_center(j, image_.width, problem_.grid_w);
      cells[j] = static_cast<int32_t>(image_.first_row + finder_.find(line[x]));
    }
  }

  const Problem& problem_;
  const Image& image_;
  const Band& band_;
  RowFinder finder_;
  int64_t num_touched_ = 0;
};

// Joins what the bands of an image saw of one row.
void write_row(const Problem& problem, const Image& image, int64_t row, const Band* begin,
               const Band* end) {
  RowFacts all = begin->facts[row];
  for (const Band* band = begin + 1; band < end; ++band) {
    const RowFacts& part = band->facts[row];
    all.area += part.area;
    if (part.x0 < all.x0) all.x0 = part.x0;
    if (part.y0 < all.y0) all.y0 = part.y0;
    if (part.x1 > all.x1) all.x1 = part.x1;
    if (part.y1 > all.y1) all.y1 = part.y1;
  }
  float* box = problem.row_box + 4 * (image.first_row + row);
  const bool empty = row == 0 || all.area == 0;
  const float width = static_cast<float>(image.width), height = static_cast<float>(image.height);
  box[0] = empty ? 0.0f : static_cast<float>(all.x0) / width;
  box[1] = empty ? 0.0f : static_cast<float>(all.y0) / height;
  box[2] = empty ? 0.0f : static_cast<float>(all.x1) / width;
  box[3] = empty ? 0.0f : static_cast<float>(all.y1) / height;
  problem.row_area[image.first_row + row] = all.area;
}

}  // namespace

void forward(const Problem& problem, const Band* bands, const int64_t* first_band) {
  parallel_for(first_band[problem.num_images], 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) BandPass(problem, bands[k]).run();
  });
  for (int64_t b = 0; b < problem.num_images; ++b) {
    const Image& image = problem.images[b];
    for (int64_t row = 0; row < image.rows; ++row) {
      write_row(problem, image, row, bands + first_band[b], bands + first_band[b + 1]);
    }
  }
}

}  // namespace collavo::panoptic_lookup::COLLAVO_ISA
