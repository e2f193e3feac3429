#include <algorithm>
#include <memory>
#include <vector>

#include "panoptic_lookup/panoptic_lookup.h"

namespace collavo::panoptic_lookup {

namespace {

// Pixels of a band: enough work to be worth waking a thread, which takes as long as a small map.
constexpr int64_t kBandPixels = 256 * 1024;

void run(int isa, const Problem& problem, const Band* bands, const int64_t* first_band) {
  COLLAVO_RETURN_PER_ISA(isa, forward(problem, bands, first_band));
}

}  // namespace

void forward(int isa, const Problem& problem) {
  std::vector<Band> bands;
  std::vector<int64_t> first_band;
  int64_t rows = 0;
  for (int64_t b = 0; b < problem.num_images; ++b) {
    const Image& image = problem.images[b];
    const int64_t pixels = image.height * image.width;
    const int64_t wanted = std::clamp<int64_t>(pixels / kBandPixels, 1, problem.grid_h);
    first_band.push_back(static_cast<int64_t>(bands.size()));
    for (int64_t k = 0; k < wanted; ++k) {
      const int64_t begin = k * problem.grid_h / wanted, end = (k + 1) * problem.grid_h / wanted;
      bands.push_back({b, begin, end, nullptr, nullptr, nullptr});
      rows += image.rows;
    }
  }
  first_band.push_back(static_cast<int64_t>(bands.size()));
  // Not initialised here: each band clears its own part, on its own thread.
  const std::unique_ptr<RowFacts[]> facts(new RowFacts[rows]);
  const std::unique_ptr<int32_t[]> counters(new int32_t[2 * rows]);
  int64_t used = 0;
  for (Band& band : bands) {
    const int64_t own = problem.images[band.image].rows;
    band.facts = facts.get() + used;
    band.counts = counters.get() + 2 * used;
    band.touched = band.counts + own;
    used += own;
  }
  run(isa, problem, bands.data(), first_band.data());
}

}  // namespace collavo::panoptic_lookup
