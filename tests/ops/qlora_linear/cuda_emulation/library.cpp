// The GPU library's launchers on the emulated GPU, and what a test sets and asks.

#include "qlora_linear/decode.cu"

extern "C" {

void emulated_device(int clusters, int processors, int shared_per_processor) {
  emulated::machine.clusters = clusters != 0;
  emulated::machine.processors = processors;
  emulated::machine.shared_per_processor = shared_per_processor;
}

unsigned emulated_launches() {
  return emulated::machine.launches;
}

const char* collavo_cuda_error_string(int) {
  return "invalid argument";
}
}
