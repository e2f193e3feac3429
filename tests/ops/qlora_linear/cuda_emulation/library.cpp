// The GPU library's launchers on the emulated GPU, and what a test sets and asks.

#include "qlora_linear/cuda/decode.cu"

extern "C" {

void emulated_device(int clusters, int processors, int shared_per_processor) {
  emulated::machine.clusters = clusters != 0;
  emulated::machine.processors = processors;
  emulated::machine.shared_per_processor = shared_per_processor;
}

// Waits for all launches.
void emulated_finish() {
  emulated::finish();
}

// Blocks in a cluster of the last launch.
int emulated_cluster() {
  return static_cast<int>(emulated::machine.blocks.size());
}

// Memory that ends, up to 16 bytes, where no access is allowed. It is never given back.
void* emulated_memory(size_t bytes) {
  return (new emulated::Guarded(bytes))->data();
}

const char* collavo_cuda_error_string(int) {
  return "invalid argument";
}
}
