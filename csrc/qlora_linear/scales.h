// The scales of an NF4 weight, one per block of the flattened matrix.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/integers.h"
#include "qlora_linear/qlora_linear.h"

namespace collavo::qlora_linear {

namespace {

// Scales by block, with the second quantisation undone as torch computes it: a product and a sum,
// each rounded.
class Scales {
 public:
  explicit Scales(const NF4& weight) : raw_(weight.scales), nested_(weight.double_quant) {
    while ((int64_t{1} << shift_) < weight.block_size) ++shift_;
    const int64_t elements = weight.rows * weight.columns;
    const int64_t blocks = (elements + weight.block_size - 1) >> shift_;
    outer_ = raw_ + sizeof(float);
    code_ = outer_ + ceil_divide(blocks, 256) * sizeof(float);
    codes_ = code_ + 256 * sizeof(float);
    if (nested_) offset_ = read(raw_, 0);
  }

  // The scale of the block that holds a flat element.
  float at(int64_t element) const {
    const int64_t block = element >> shift_;
    if (!nested_) return read(raw_, block);
    return read(code_, codes_[block]) * read(outer_, block >> 8) + offset_;
  }

  int64_t block_end(int64_t element) const { return ((element >> shift_) + 1) << shift_; }

 private:
  static float read(const uint8_t* bytes, int64_t index) {
    float value;  // bytes of any alignment
    std::memcpy(&value, bytes + index * sizeof(float), sizeof(float));
    return value;
  }

  const uint8_t* raw_;
  const uint8_t* outer_ = nullptr;
  const uint8_t* code_ = nullptr;
  const uint8_t* codes_ = nullptr;
  float offset_ = 0.0f;
  int shift_ = 0;
  bool nested_;
};

}  // namespace

}  // namespace collavo::qlora_linear
