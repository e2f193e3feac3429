// What every user of the CUDA library needs: is there a device, and what does an error code mean.

#include <cuda_runtime.h>

extern "C" {

// Devices that can be used. Any error (no driver, a driver too old, no device) is 0: they all mean
// that there is nothing to launch on.
int collavo_cuda_device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

// The runtime's words for what a launcher returned.
const char* collavo_cuda_error_string(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}
}
