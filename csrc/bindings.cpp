// The Python module collavo_kernels._C: the only file that knows Python.
//
// Every operator has one bind_<op>(module) here. Functions take addresses, sizes, dtype codes and
// an instruction set code that the Python wrappers have checked, and release the GIL while they
// work.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "common/cpu_features.h"
#include "common/parallel.h"

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
  module.def("build_info", &build_info, "Version, compiler and compiled instruction sets.");
  module.def("attach_thread_pool", &attach_thread_pool,
             "Find torch's OpenMP runtime; False if there is none.");
  module.def("thread_pool_path", &thread_pool_path, "The runtime in use, or '' (serial).");
  module.def("num_threads", &num_threads, "Threads a loop would use now.");
}

}  // namespace

}  // namespace collavo

PYBIND11_MODULE(_C, module) {
  module.doc() = "CPU kernels of collavo_kernels.";
  collavo::bind_common(module);
}
