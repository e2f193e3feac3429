// The pass over the maps. Maps are piecewise constant: most cells lie in one segment, which one
// look shows. Of the others, the pixels of one id after another are bits of masks, whose sums give
// the cell's counts and the rows' areas and boxes.

#include <algorithm>
#include <cstdint>
#include <limits>

#include "common/parallel.h"
#include "panoptic_lookup/panoptic_lookup.h"
#include "panoptic_lookup/pixels.h"

namespace collavo::panoptic_lookup::COLLAVO_ISA {

namespace {

// Ids of a tile that are looked for in all of its pixels; pixels of others are taken one by one.
constexpr int kPasses = 8;
// After an id with fewer, others are not likely to have more.
constexpr int64_t kFewPixels = 8;
constexpr int64_t kMostLines = 64;  // of a tile, beside kMostPixels
constexpr int64_t kCacheLine = 64;  // bytes

inline int64_t lowest_bit(uint64_t bits) {
  return __builtin_ctzll(bits);
}

inline int64_t highest_bit(uint64_t bits) {
  return 63 - __builtin_clzll(bits);
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

// The pixels of a cell along one axis. Those before `owned_end` are no other cell's: they cut the
// axis, where the cells themselves share a pixel if they do not divide it.
struct Span {
  int64_t begin;
  int64_t end;
  int64_t owned_end;
};

inline Span span_of(int64_t cell, int64_t length, int64_t cells) {
  // Sides of at most 32767: products fit into 32 bits, whose division is the faster one.
  const uint32_t n = static_cast<uint32_t>(length), of = static_cast<uint32_t>(cells);
  const uint32_t here = static_cast<uint32_t>(cell) * n, next = here + n;
  const uint32_t owned_end = next / of;
  return {here / of, owned_end + (next % of != 0), owned_end};
}

inline int64_t center_of(int64_t cell, int64_t length, int64_t cells) {
  return (2 * cell + 1) * length / (2 * cells);
}

inline void add_box(RowFacts& facts, int64_t area, int64_t x0, int64_t y0, int64_t x1, int64_t y1) {
  facts.area += static_cast<int32_t>(area);
  if (x0 < facts.x0) facts.x0 = static_cast<int32_t>(x0);
  if (y0 < facts.y0) facts.y0 = static_cast<int32_t>(y0);
  if (x1 > facts.x1) facts.x1 = static_cast<int32_t>(x1);
  if (y1 > facts.y1) facts.y1 = static_cast<int32_t>(y1);
}

// Part of a cell: its pixels, and how many of its lines and columns are no other cell's.
struct Tile {
  const uint8_t* pixels;
  int64_t x, y;
  int64_t width, height;
  int64_t owned_width, owned_height;

  uint64_t owned_columns() const { return owned_width > 0 ? first_bits(owned_width) : 0; }

  uint64_t owned(int64_t line) const { return line < owned_height ? owned_columns() : 0; }
};

// The pixels of a tile that have one id.
struct Part {
  int64_t pixels = 0;
  int64_t area = 0;                 // of those that are no other cell's,
  uint64_t columns = 0, lines = 0;  // and where they are

  void add(uint64_t bits, uint64_t owned, int64_t line) {
    pixels += __builtin_popcountll(bits);
    const uint64_t own = bits & owned;
    area += __builtin_popcountll(own);
    columns |= own;
    lines |= uint64_t{own != 0} << line;
  }
};

template <typename Pixels>
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
    int32_t* cells = problem_.row_index + band_.image * problem_.grid_h * problem_.grid_w;
    for (int64_t i = band_.begin; i < band_.end; ++i) {
      line_of_cells(i, cells + i * problem_.grid_w);
    }
  }

 private:
  void line_of_cells(int64_t i, int32_t* cells) {
    const Span rows = span_of(i, image_.height, problem_.grid_h);
    const int64_t middle = center_of(i, image_.height, problem_.grid_h);
    for (int64_t j = 0; j < problem_.grid_w; ++j) {
      const Span columns = span_of(j, image_.width, problem_.grid_w);
      ask_for_next(rows, columns);
      int64_t row = add_cell(rows, columns);
      if (!problem_.majority) {
        const int64_t x = center_of(j, image_.width, problem_.grid_w);
        row = finder_.find(Pixels::at(image_.map + middle * image_.stride, x));
      }
      cells[j] = static_cast<int32_t>(image_.first_row + row);
    }
  }

  // Asks for the cell below, to be there when its turn comes: a cell's lines lie too far from each
  // other for the processor to foresee them. Inlined by force, for a call without an effect on its
  // results is taken out.
  [[gnu::always_inline]] void ask_for_next(const Span& rows, const Span& columns) {
    const int64_t below = std::min(rows.end - rows.begin, image_.height - rows.end);
    const int64_t lines = std::min(below, kMostLines);
    const int64_t bytes = (columns.end - columns.begin) * Pixels::kBytes;
    const uint8_t* line = image_.map + rows.end * image_.stride + columns.begin * Pixels::kBytes;
    for (int64_t y = 0; y < lines; ++y, line += image_.stride) {
      for (int64_t b = 0; b < bytes; b += kCacheLine) __builtin_prefetch(line + b, 0, 2);
    }
  }

  // Adds a cell to the rows' facts and returns the row with most of its pixels.
  int64_t add_cell(const Span& rows, const Span& columns) {
    num_touched_ = 0;
    for (int64_t y = rows.begin; y < rows.end; y += kMostLines) {
      for (int64_t x = columns.begin; x < columns.end; x += kMostPixels) {
        Tile tile;
        tile.pixels = image_.map + y * image_.stride + x * Pixels::kBytes;
        tile.x = x;
        tile.y = y;
        tile.width = std::min(columns.end - x, kMostPixels);
        tile.height = std::min(rows.end - y, kMostLines);
        tile.owned_width = std::min(columns.owned_end - x, kMostPixels);
        tile.owned_height = std::min(rows.owned_end - y, kMostLines);
        if (!uniform<Pixels>(patch_of(tile))) {
          add_parts(tile);
          continue;
        }
        const int64_t row = add_whole(tile);
        if (tile.width == columns.end - columns.begin && tile.height == rows.end - rows.begin) {
          return row;  // the tile is the cell
        }
        count(row, tile.width * tile.height);
      }
    }
    return take_majority();
  }

  Patch patch_of(const Tile& tile) const {
    return {tile.pixels, image_.stride, tile.height, tile.width};
  }

  int64_t add_whole(const Tile& tile) {
    const int64_t row = finder_.find(Pixels::at(tile.pixels, 0));
    if (tile.owned_width > 0 && tile.owned_height > 0) {
      add_box(band_.facts[row], tile.owned_width * tile.owned_height, tile.x, tile.y,
              tile.x + tile.owned_width, tile.y + tile.owned_height);
    }
    return row;
  }

  // A tile with several ids, of which most have two: these are counted together.
  void add_parts(const Tile& tile) {
    const int32_t id = Pixels::at(tile.pixels, 0), other = other_id(tile, id);
    Pair bits[kMostLines];
    match<Pixels>(patch_of(tile), id, other, bits);
    uint64_t left[kMostLines], any = 0;  // pixels with neither
    Part part, second;
    const uint64_t columns = tile.owned_columns();
    for (int64_t y = 0; y < tile.height; ++y) {
      const uint64_t owned = y < tile.owned_height ? columns : 0;
      part.add(bits[y].first, owned, y);
      second.add(bits[y].second, owned, y);
      left[y] = first_bits(tile.width) & ~(bits[y].first | bits[y].second);
      any |= left[y];
    }
    add_part(tile, id, part);
    if (second.pixels > 0) add_part(tile, other, second);
    if (any != 0) add_others(tile, left);
  }

  // An id of the first or the last line that is not `id`, or `id` itself if there is none.
  int32_t other_id(const Tile& tile, int32_t id) const {
    for (const int64_t y : {int64_t{0}, tile.height - 1}) {
      const uint8_t* line = tile.pixels + y * image_.stride;
      Pair same;
      match<Pixels>({line, 0, 1, tile.width}, id, id, &same);
      const uint64_t others = first_bits(tile.width) & ~same.first;
      if (others != 0) return Pixels::at(line, lowest_bit(others));
    }
    return id;
  }

  void add_others(const Tile& tile, uint64_t* left) {
    int64_t line = 0;
    for (int pass = 0; pass < kPasses; ++pass) {
      while (line < tile.height && left[line] == 0) ++line;
      if (line == tile.height) return;
      const int32_t id = Pixels::at(tile.pixels + line * image_.stride, lowest_bit(left[line]));
      Pair bits[kMostLines];
      match<Pixels>(patch_of(tile), id, id, bits);
      Part part;
      for (int64_t y = line; y < tile.height; ++y) {
        part.add(bits[y].first, tile.owned(y), y);
        left[y] &= ~bits[y].first;
      }
      add_part(tile, id, part);
      if (part.pixels < kFewPixels) break;
    }
    for (; line < tile.height; ++line) {
      for (uint64_t bits = left[line]; bits != 0; bits &= bits - 1) {
        Part part;
        part.add(bits & -bits, tile.owned(line), line);
        add_part(tile, Pixels::at(tile.pixels + line * image_.stride, lowest_bit(bits)), part);
      }
    }
  }

  void add_part(const Tile& tile, int32_t id, const Part& part) {
    const int64_t row = finder_.find(id);
    count(row, part.pixels);
    if (part.area == 0) return;
    add_box(band_.facts[row], part.area, tile.x + lowest_bit(part.columns),
            tile.y + lowest_bit(part.lines), tile.x + highest_bit(part.columns) + 1,
            tile.y + highest_bit(part.lines) + 1);
  }

  void count(int64_t row, int64_t pixels) {
    int32_t& counted = band_.counts[row];
    if (counted == 0) band_.touched[num_touched_++] = static_cast<int32_t>(row);
    counted += static_cast<int32_t>(pixels);
  }

  // The row with most pixels, the lowest of several; clears the counts for the next cell.
  int64_t take_majority() {
    int32_t best = 0;
    int64_t best_row = 0;
    for (int64_t k = 0; k < num_touched_; ++k) {
      const int32_t row = band_.touched[k], counted = band_.counts[row];
      band_.counts[row] = 0;
      if (counted > best || (counted == best && row < best_row)) {
        best = counted;
        best_row = row;
      }
    }
    return best_row;
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
    if (part.area > 0) add_box(all, part.area, part.x0, part.y0, part.x1, part.y1);
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
    for (int64_t k = begin; k < end; ++k) {
      problem.images[bands[k].image].coloured ? BandPass<Colours>(problem, bands[k]).run()
                                              : BandPass<Ids>(problem, bands[k]).run();
    }
  });
  for (int64_t b = 0; b < problem.num_images; ++b) {
    const Image& image = problem.images[b];
    for (int64_t row = 0; row < image.rows; ++row) {
      write_row(problem, image, row, bands + first_band[b], bands + first_band[b + 1]);
    }
  }
}

}  // namespace collavo::panoptic_lookup::COLLAVO_ISA
