// The Python module collavo_kernels._C: the only file that knows Python.
//
// Every operator has one bind_<op>(module) here. Functions take addresses, sizes, dtype codes and
// an instruction set code that the Python wrappers have checked, and release the GIL while they
// work.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "common/cpu_features.h"
#include "common/huge_pages.h"
#include "common/parallel.h"
#include "crayon_attention/crayon_attention.h"
#include "panoptic_lookup/panoptic_lookup.h"
#include "qlora_linear/qlora_linear.h"

namespace py = pybind11;

namespace collavo {

namespace {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (isa_usable(isa)) names.emplace_back(isa_name(isa));
  }
  return names;
}

py::dict features() {
  const CpuFeatures& cpu = cpu_features();
  py::dict result;
  result["avx2"] = cpu.avx2;
  result["avx512"] = cpu.avx512;
  result["avx512_vbmi"] = cpu.avx512_vbmi;
  result["avx512_vnni"] = cpu.avx512_vnni;
  result["avx512_bf16"] = cpu.avx512_bf16;
  return result;
}

py::dict build_info() {
  py::dict result;
  result["version"] = COLLAVO_VERSION;
  result["compiler"] = __VERSION__;
  result["instruction_sets"] = COLLAVO_ISA_LIST;
  return result;
}

void bind_common(py::module_& module) {
  module.def("cpu_features", &features, "What this processor has, by name.");
  module.def("isas", &usable_isas, "Instruction sets compiled in that this processor runs.");
  module.def("best_isa", [] { return isa_name(best_isa()); }, "The one that code -1 chooses.");
  module.def(
      "use_isa", [](int isa) { use_isa(static_cast<Isa>(isa)); },
      "Make another instruction set the one that code -1 chooses.");
  module.def("build_info", &build_info, "Version, compiler and compiled instruction sets.");
  module.def("attach_thread_pool", &attach_thread_pool,
             "Find torch's OpenMP runtime; False if there is none.");
  module.def("thread_pool_path", &thread_pool_path, "The runtime in use, or '' (serial).");
  module.def("num_threads", &num_threads, "Threads a loop would use now.");
  module.def("advise_huge_pages", &advise_huge_pages,
             "Ask for huge pages under a large buffer; a hint.");
}

template <typename T>
T* pointer_of(int64_t address) {
  return reinterpret_cast<T*>(address);
}

// [address, batch stride, token stride, head stride]; address 0 for an absent tensor.
using HeadsArray = std::array<int64_t, 4>;

crayon_attention::Heads heads_of(const HeadsArray& x) {
  return {pointer_of<void>(x[0]), x[1], x[2], x[3]};
}

// [dtype, batch, length, query heads, key heads, head dim, rows], [cos, sin, their batch stride,
// row index, key range], causal, window, scale
using ProblemTuple =
    std::tuple<std::array<int64_t, 7>, std::array<int64_t, 5>, bool, int64_t, float>;

crayon_attention::Problem problem_of(const ProblemTuple& x) {
  const auto& [sizes, tokens, causal, window, scale] = x;
  return {static_cast<DType>(sizes[0]),
          sizes[1],
          sizes[2],
          sizes[3],
          sizes[4],
          sizes[5],
          sizes[6],
          pointer_of<const float>(tokens[0]),
          pointer_of<const float>(tokens[1]),
          tokens[2],
          pointer_of<const int32_t>(tokens[3]),
          pointer_of<const int32_t>(tokens[4]),
          causal,
          window,
          scale};
}

void bind_crayon_attention(py::module_& module) {
  namespace op = crayon_attention;
  module.attr("crayon_attention_largest_head_dim") = op::kLargestHeadDim;
  module.def(
      "crayon_attention_first_bad_row",
      [](int64_t row_index, int64_t count, int64_t rows) {
        return op::first_bad_row(pointer_of<const int32_t>(row_index), count, rows);
      },
      "Position of the first row index outside the tables, or -1.");
  module.def(
      "crayon_attention_first_bad_range",
      [](int64_t key_range, int64_t batch, int64_t length) {
        return op::first_bad_range(pointer_of<const int32_t>(key_range), batch, length);
      },
      "The first sample whose key range is inverted or leaves the sequence, or -1.");
  module.def(
      "crayon_attention_number_slots",
      [](int64_t row_index, int64_t batch, int64_t length, int64_t rows, int64_t slots) {
        return op::number_slots(pointer_of<const int32_t>(row_index), batch, length, rows,
                                pointer_of<int32_t>(slots));
      },
      "Number the pairs of a sample and a row that a token has; how many there are.");
  module.def(
      "crayon_attention_forward",
      [](int isa, int64_t threads, int64_t scratch, const ProblemTuple& problem,
         const std::array<HeadsArray, 6>& heads, const std::array<int64_t, 4>& others) {
        const op::ForwardArgs args{problem_of(problem),
                                   heads_of(heads[0]),
                                   heads_of(heads[1]),
                                   heads_of(heads[2]),
                                   pointer_of<const void>(others[0]),
                                   pointer_of<const void>(others[1]),
                                   pointer_of<const void>(others[2]),
                                   heads_of(heads[3]),
                                   heads_of(heads[4]),
                                   heads_of(heads[5]),
                                   pointer_of<float>(others[3])};
        if (scratch == 0) return op::forward_scratch(isa, args, threads);
        py::gil_scoped_release unlocked;
        op::forward(isa, args, threads, pointer_of<void>(scratch));
        return int64_t{0};
      },
      "q, k, v to key, value, out with table_q, table_k, table_v, lse; without scratch: its "
      "bytes.");
  module.def(
      "crayon_attention_backward",
      [](int isa, int64_t threads, int64_t scratch, const ProblemTuple& problem,
         const std::array<HeadsArray, 10>& heads, const std::array<int64_t, 7>& others) {
        const op::BackwardArgs args{problem_of(problem),
                                    heads_of(heads[0]),
                                    heads_of(heads[1]),
                                    heads_of(heads[2]),
                                    pointer_of<const void>(others[0]),
                                    heads_of(heads[3]),
                                    heads_of(heads[4]),
                                    heads_of(heads[5]),
                                    heads_of(heads[6]),
                                    pointer_of<const float>(others[1]),
                                    heads_of(heads[7]),
                                    heads_of(heads[8]),
                                    heads_of(heads[9]),
                                    pointer_of<void>(others[2]),
                                    pointer_of<void>(others[3]),
                                    pointer_of<void>(others[4]),
                                    pointer_of<const int32_t>(others[5]),
                                    others[6]};
        if (scratch == 0) return op::backward_scratch(isa, args, threads);
        py::gil_scoped_release unlocked;
        op::backward(isa, args, threads, pointer_of<void>(scratch));
        return int64_t{0};
      },
      "q, key, value, out, three gradients to dq, dk, dv with table_q, lse, the tables' sums, "
      "slots "
      "and their count; without scratch: its bytes.");
}

void bind_panoptic_lookup(py::module_& module) {
  namespace op = panoptic_lookup;
  module.def(
      "panoptic_lookup",
      [](int isa, uintptr_t images, int64_t num_images, uintptr_t row_ids, int64_t grid_h,
         int64_t grid_w, bool majority, uintptr_t row_index, uintptr_t row_box,
         uintptr_t row_area) {
        const op::Problem problem{reinterpret_cast<const op::Image*>(images),
                                  num_images,
                                  reinterpret_cast<const int32_t*>(row_ids),
                                  grid_h,
                                  grid_w,
                                  majority,
                                  reinterpret_cast<int32_t*>(row_index),
                                  reinterpret_cast<float*>(row_box),
                                  reinterpret_cast<int32_t*>(row_area)};
        py::gil_scoped_release unlocked;
        op::forward(isa, problem);
      },
      "The row of every grid cell, and the box and area of every row.");
}

// [packed, scales, rows, columns, block size, double quant, panels]
qlora_linear::NF4 nf4_of(const std::array<int64_t, 7>& x) {
  return {pointer_of<const uint8_t>(x[0]),
          pointer_of<const uint8_t>(x[1]),
          x[2],
          x[3],
          x[4],
          x[5] != 0,
          x[6] != 0};
}

// (a, b, rank, scaling, dtype) of every adapter.
using AdapterTuple = std::tuple<int64_t, int64_t, int64_t, float, int>;

std::vector<qlora_linear::Adapter> adapters_of(const std::vector<AdapterTuple>& tuples) {
  std::vector<qlora_linear::Adapter> adapters;
  for (const auto& [a, b, rank, scaling, dtype] : tuples) {
    adapters.push_back({pointer_of<const void>(a), pointer_of<const void>(b), rank, scaling,
                        static_cast<DType>(dtype)});
  }
  return adapters;
}

void bind_qlora_linear(py::module_& module) {
  namespace op = qlora_linear;
  module.def("qlora_linear_scratch", &op::forward_scratch,
             "float32 values that qlora_linear_forward needs as scratch.");
  module.def(
      "qlora_linear_dequantize",
      [](int isa, const std::array<int64_t, 7>& weight, const std::array<int64_t, 4>& strip,
         int dtype, int64_t out, int64_t stride) {
        const op::DequantizeArgs args{nf4_of(weight),
                                      strip[0],
                                      strip[1],
                                      strip[2],
                                      strip[3],
                                      static_cast<DType>(dtype),
                                      pointer_of<void>(out),
                                      stride};
        py::gil_scoped_release unlocked;
        op::dequantize(isa, args);
      },
      "A strip of an NF4 matrix (rows from, to, columns from, to) as dense values.");
  module.def(
      "qlora_linear_forward",
      [](int isa, const std::array<int64_t, 7>& weight, int dtype, int64_t x, int64_t tokens,
         const std::vector<AdapterTuple>& adapters, const std::array<int64_t, 4>& epilogue,
         bool int8_activations, int64_t scratch, int64_t out) {
        const std::vector<op::Adapter> branches = adapters_of(adapters);
        const op::ForwardArgs args{nf4_of(weight),
                                   static_cast<DType>(dtype),
                                   pointer_of<const void>(x),
                                   tokens,
                                   branches.data(),
                                   static_cast<int64_t>(branches.size()),
                                   pointer_of<const uint8_t>(epilogue[0]),
                                   pointer_of<const float>(epilogue[1]),
                                   pointer_of<const int32_t>(epilogue[2]),
                                   pointer_of<const float>(epilogue[3]),
                                   int8_activations,
                                   pointer_of<float>(scratch),
                                   pointer_of<void>(out)};
        py::gil_scoped_release unlocked;
        op::forward(isa, args);
      },
      "The whole operator for a few tokens; epilogue is mask, row table, row index, bias.");
  module.def(
      "qlora_linear_many_scratch",
      [](int64_t terms, const std::vector<int64_t>& ranks) {
        return op::many_scratch(terms, ranks.data(), static_cast<int64_t>(ranks.size()));
      },
      "bfloat16 values that qlora_linear_many needs as scratch.");
  module.def(
      "qlora_linear_many",
      [](int isa, bool backward, const std::array<int64_t, 7>& weight,
         const std::array<int64_t, 3>& left, int64_t total_rank,
         const std::vector<AdapterTuple>& adapters, const std::array<int64_t, 3>& epilogue,
         int64_t scratch, int64_t out) {
        const std::vector<op::Adapter> branches = adapters_of(adapters);
        const op::ManyArgs args{nf4_of(weight),
                                pointer_of<const BFloat16>(left[0]),
                                left[1],
                                pointer_of<const BFloat16>(left[2]),
                                branches.data(),
                                static_cast<int64_t>(branches.size()),
                                total_rank,
                                pointer_of<const float>(epilogue[0]),
                                pointer_of<const int32_t>(epilogue[1]),
                                pointer_of<const float>(epilogue[2]),
                                pointer_of<BFloat16>(scratch),
                                pointer_of<BFloat16>(out)};
        py::gil_scoped_release unlocked;
        backward ? op::grad_x_many(isa, args) : op::forward_many(isa, args);
      },
      "Many tokens in bfloat16 (x, tokens, hidden); epilogue is row table, row index, bias.");
  module.def(
      "qlora_linear_add_rows",
      [](int isa, int dtype, int64_t out, int64_t table, int64_t row_index, int64_t tokens,
         int64_t columns) {
        const op::AddRowsArgs args{static_cast<DType>(dtype),
                                   pointer_of<void>(out),
                                   pointer_of<const float>(table),
                                   pointer_of<const int32_t>(row_index),
                                   tokens,
                                   columns};
        py::gil_scoped_release unlocked;
        op::add_rows(isa, args);
      },
      "Add each token's table row.");
  module.def(
      "qlora_linear_sum_rows",
      [](int isa, int dtype, int64_t grad, int64_t row_index, int64_t table, int64_t tokens,
         int64_t columns, int64_t rows) {
        const op::SumRowsArgs args{static_cast<DType>(dtype),
                                   pointer_of<const void>(grad),
                                   pointer_of<const int32_t>(row_index),
                                   pointer_of<float>(table),
                                   tokens,
                                   columns,
                                   rows};
        py::gil_scoped_release unlocked;
        op::sum_rows(isa, args);
      },
      "Sum the gradients of each table row.");
  module.def(
      "qlora_linear_product",
      [](int isa, const std::array<int64_t, 3>& a, const std::array<int64_t, 3>& b,
         const std::array<int64_t, 2>& c, const std::array<int64_t, 3>& shape) {
        const op::ProductArgs args{pointer_of<const float>(a[0]),
                                   a[1],
                                   a[2],
                                   pointer_of<const float>(b[0]),
                                   b[1],
                                   b[2],
                                   pointer_of<float>(c[0]),
                                   c[1],
                                   shape[0],
                                   shape[1],
                                   shape[2]};
        py::gil_scoped_release unlocked;
        op::product(isa, args);
      },
      "c = a b in float32 for thin matrices, the same bits for any number of threads.");
}

}  // namespace

}  // namespace collavo

PYBIND11_MODULE(_C, module) {
  module.doc() = "CPU kernels of collavo_kernels.";
  collavo::bind_common(module);
  collavo::bind_crayon_attention(module);
  collavo::bind_panoptic_lookup(module);
  collavo::bind_qlora_linear(module);
}
