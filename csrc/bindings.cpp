// The Python module collavo_kernels._C.
//
// Every operator has one bind_<op>(module) here. Functions take keyword arguments (bindings.h) that
// the Python wrappers have checked: tensors, sizes, dtype codes and an instruction set code, and
// with `allocate` a function that gives scratch. They release the GIL while they work.
#include "bindings.h"

#include <pybind11/stl.h>

#include <string>
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

// Adds a function that gets its keyword arguments as they are.
template <typename F>
void add(py::module_& module, const char* name, F run, const char* doc) {
  module.def(
      name, [name, run](const py::kwargs& given) { return run(Fields(name, given.ptr())); }, doc);
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
  add(
      module, "advise_huge_pages",
      [](const Fields& given) {
        const void* memory;
        int64_t bytes;
        given.read(ARGUMENT(memory), ARGUMENT(bytes));
        advise_huge_pages(reinterpret_cast<uintptr_t>(memory), bytes);
      },
      "Ask for huge pages under a large buffer; a hint.");
}

}  // namespace

// What follows is static, and not in unnamed namespaces: reading a struct's fields looks for load()
// beside the struct, and such a look-up does not see into them.

namespace crayon_attention {

static void load(const Value& value, Heads& to) {
  to = {};
  if (value.absent()) return;
  int64_t strides[4];
  value.strides(strides);
  to = {value.address(), strides[0], strides[1], strides[2]};
}

static void load(const Value& value, Problem& to) {
  value.fields().read(FIELD(dtype), FIELD(batch), FIELD(length), FIELD(q_heads), FIELD(kv_heads),
                      FIELD(head_dim), FIELD(table_rows), FIELD_OR_NONE(cos), FIELD_OR_NONE(sin),
                      FIELD(angle_batch_stride), FIELD_OR_NONE(row_index), FIELD_OR_NONE(key_range),
                      FIELD(causal), FIELD(window), FIELD(softmax_scale));
}

static void run_forward(const Fields& given) {
  int isa;
  Allocator allocate;
  ForwardArgs to{};
  given.read(ARGUMENT(isa), ARGUMENT(allocate), FIELD(problem), FIELD(q), FIELD(k), FIELD(v),
             FIELD_OR_NONE(crayon_q), FIELD_OR_NONE(crayon_k), FIELD_OR_NONE(crayon_v),
             FIELD_OR_NONE(key), FIELD_OR_NONE(value), FIELD(out), FIELD(lse));
  const int64_t threads = num_threads();
  void* scratch = allocate.take(forward_scratch(isa, to, threads));
  py::gil_scoped_release unlocked;
  forward(isa, to, threads, scratch);
}

static void run_backward(const Fields& given) {
  int isa;
  Allocator allocate;
  BackwardArgs to{};
  given.read(ARGUMENT(isa), ARGUMENT(allocate), FIELD(problem), FIELD(q), FIELD(key), FIELD(value),
             FIELD_OR_NONE(crayon_q), FIELD(out), FIELD(grad_out), FIELD_OR_NONE(grad_key),
             FIELD_OR_NONE(grad_value), FIELD(lse), FIELD_OR_NONE(grad_q), FIELD_OR_NONE(grad_k),
             FIELD_OR_NONE(grad_v), FIELD_OR_NONE(grad_crayon_q), FIELD_OR_NONE(grad_crayon_k),
             FIELD_OR_NONE(grad_crayon_v), FIELD_OR_NONE(slots), FIELD(slot_count));
  const int64_t threads = num_threads();
  void* scratch = allocate.take(backward_scratch(isa, to, threads));
  py::gil_scoped_release unlocked;
  backward(isa, to, threads, scratch);
}

static int64_t run_first_bad_row(const Fields& given) {
  const int32_t* row_index;
  int64_t count, table_rows;
  given.read(ARGUMENT(row_index), ARGUMENT(count), ARGUMENT(table_rows));
  return first_bad_row(row_index, count, table_rows);
}

static int64_t run_first_bad_range(const Fields& given) {
  const int32_t* key_range;
  int64_t batch, length;
  given.read(ARGUMENT(key_range), ARGUMENT(batch), ARGUMENT(length));
  return first_bad_range(key_range, batch, length);
}

static int64_t run_number_slots(const Fields& given) {
  const int32_t* row_index;
  int64_t batch, length, table_rows;
  int32_t* slots;
  given.read(ARGUMENT(row_index), ARGUMENT(batch), ARGUMENT(length), ARGUMENT(table_rows),
             ARGUMENT(slots));
  return number_slots(row_index, batch, length, table_rows, slots);
}

static void bind_crayon_attention(py::module_& module) {
  module.attr("crayon_attention_largest_head_dim") = kLargestHeadDim;
  add(module, "crayon_attention_first_bad_row", run_first_bad_row,
      "Position of the first row index outside the tables, or -1.");
  add(module, "crayon_attention_first_bad_range", run_first_bad_range,
      "The first sample whose key range is inverted or leaves the sequence, or -1.");
  add(module, "crayon_attention_number_slots", run_number_slots,
      "Number the pairs of a sample and a row that a token has; how many there are.");
  add(module, "crayon_attention_forward", run_forward,
      "Write key, value, out and lse; absent tensors are None.");
  add(module, "crayon_attention_backward", run_backward, "Write the gradients that are not None.");
}

}  // namespace crayon_attention

namespace panoptic_lookup {

static void run_forward(const Fields& given) {
  int isa;
  Problem to{};
  given.read(ARGUMENT(isa), FIELD(images), FIELD(num_images), FIELD(row_ids), FIELD(grid_h),
             FIELD(grid_w), FIELD(majority), FIELD(row_index), FIELD(row_box), FIELD(row_area));
  py::gil_scoped_release unlocked;
  forward(isa, to);
}

static void bind_panoptic_lookup(py::module_& module) {
  add(module, "panoptic_lookup", run_forward,
      "The row of every grid cell, and the box and area of every row.");
}

}  // namespace panoptic_lookup

namespace qlora_linear {

static void load(const Value& value, NF4& to) {
  value.fields().read(FIELD(packed), FIELD(scales), FIELD(rows), FIELD(columns), FIELD(block_size),
                      FIELD(double_quant), FIELD(in_panels));
}

static void load(const Value& value, Adapter& to) {
  value.fields().read(FIELD_OR_NONE(a), FIELD_OR_NONE(b), FIELD(rank), FIELD(scaling),
                      FIELD(dtype));
}

static void load(const Value& value, Matrix& to) {
  int64_t strides[2];
  value.strides(strides);
  to = {static_cast<float*>(value.address()), strides[0], strides[1]};
}

static void run_dequantize(const Fields& given) {
  int isa;
  DequantizeArgs to{};
  given.read(ARGUMENT(isa), FIELD(weight), FIELD(row_begin), FIELD(row_end), FIELD(column_begin),
             FIELD(column_end), FIELD(dtype), FIELD(out), FIELD(row_stride));
  py::gil_scoped_release unlocked;
  dequantize(isa, to);
}

static void run_forward(const Fields& given) {
  int isa;
  Allocator allocate;
  std::vector<Adapter> adapters;
  ForwardArgs to{};
  given.read(ARGUMENT(isa), ARGUMENT(allocate), FIELD(weight), FIELD(dtype), FIELD(x),
             FIELD(tokens), ARGUMENT(adapters), FIELD_OR_NONE(adapter_mask),
             FIELD_OR_NONE(row_table), FIELD_OR_NONE(row_index), FIELD_OR_NONE(bias),
             FIELD(int8_activations), FIELD(out));
  to.adapters = adapters.data();
  to.num_adapters = static_cast<int64_t>(adapters.size());
  to.scratch = static_cast<float*>(allocate.take(forward_scratch(to)));
  py::gil_scoped_release unlocked;
  forward(isa, to);
}

// Both products of many tokens; the gradient of x has neither rows nor bias.
template <int64_t (*kScratch)(const ManyArgs&), void (*kRun)(int, const ManyArgs&)>
static void run_many(const Fields& given) {
  int isa;
  Allocator allocate;
  std::vector<Adapter> adapters;
  ManyArgs to{};
  given.read(ARGUMENT(isa), ARGUMENT(allocate), FIELD(weight), FIELD(x), FIELD(tokens),
             FIELD_OR_NONE(hidden), ARGUMENT(adapters), FIELD_OR_NONE(row_table),
             FIELD_OR_NONE(row_index), FIELD_OR_NONE(bias), FIELD(out));
  to.adapters = adapters.data();
  to.num_adapters = static_cast<int64_t>(adapters.size());
  for (const Adapter& adapter : adapters) to.total_rank += adapter.rank;
  to.scratch = static_cast<BFloat16*>(allocate.take(kScratch(to)));
  py::gil_scoped_release unlocked;
  kRun(isa, to);
}

static void run_add_rows(const Fields& given) {
  int isa;
  AddRowsArgs to{};
  given.read(ARGUMENT(isa), FIELD(dtype), FIELD(out), FIELD(row_table), FIELD(row_index),
             FIELD(tokens), FIELD(columns));
  py::gil_scoped_release unlocked;
  add_rows(isa, to);
}

static void run_sum_rows(const Fields& given) {
  int isa;
  SumRowsArgs to{};
  given.read(ARGUMENT(isa), FIELD(dtype), FIELD(grad_out), FIELD(row_index), FIELD(grad_row_table),
             FIELD(tokens), FIELD(columns), FIELD(table_rows));
  py::gil_scoped_release unlocked;
  sum_rows(isa, to);
}

static void run_product(const Fields& given) {
  int isa;
  ProductArgs to{};
  given.read(ARGUMENT(isa), FIELD(a), FIELD(b), FIELD(out), FIELD(m), FIELD(n), FIELD(k));
  py::gil_scoped_release unlocked;
  product(isa, to);
}

static void bind_qlora_linear(py::module_& module) {
  add(module, "qlora_linear_dequantize", run_dequantize,
      "Write a strip of an NF4 matrix as dense values.");
  add(module, "qlora_linear_forward", run_forward, "The whole operator for a few tokens.");
  add(module, "qlora_linear_forward_many", run_many<forward_many_scratch, forward_many>,
      "Many tokens in bfloat16: [x, hidden] [W, B]^T and row table, row index, bias.");
  add(module, "qlora_linear_grad_x_many", run_many<grad_x_many_scratch, grad_x_many>,
      "Many tokens in bfloat16: x is the output's gradient, [x, hidden] [W; A].");
  add(module, "qlora_linear_add_rows", run_add_rows, "Add each token's table row.");
  add(module, "qlora_linear_sum_rows", run_sum_rows, "Sum the gradients of each table row.");
  add(module, "qlora_linear_product", run_product,
      "out = a b in float32 for thin matrices, the same bits for any number of threads.");
}

}  // namespace qlora_linear

}  // namespace collavo

PYBIND11_MODULE(_C, module) {
  module.doc() = "CPU kernels of collavo_kernels.";
  collavo::bind_common(module);
  collavo::crayon_attention::bind_crayon_attention(module);
  collavo::panoptic_lookup::bind_panoptic_lookup(module);
  collavo::qlora_linear::bind_qlora_linear(module);
}
