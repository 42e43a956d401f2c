// A C interface to the memory of LibTorch's accelerator. Every function returns false and sets `error` to a text where it fails;
// free it with `interlace_text_free`.

#include <cstdint>

#include <ATen/DeviceAccelerator.h>
#include <torch/types.h>

#include "caught.h"

extern "C" {

// Puts a copy in pinned host memory in the place of the tensor.
bool interlace_pin(torch::Tensor* tensor, char** error) {
  return caught(error, [&] { *tensor = tensor->pin_memory(); });
}

// Gives memory that LibTorch holds and does not use back to the accelerator.
bool interlace_release_cached(char** error) {
  return caught(error, [&] { at::accelerator::emptyCache(); });
}

// Bytes of a GPU that no process uses.
bool interlace_free_memory(int gpu, uint64_t* bytes, char** error) {
  return caught(error, [&] { *bytes = at::accelerator::getMemoryInfo(static_cast<c10::DeviceIndex>(gpu)).first; });
}

// The most bytes of a GPU that LibTorch's tensors have taken so far.
bool interlace_peak_memory(int gpu, uint64_t* bytes, char** error) {
  return caught(error, [&] {
    const auto stats = at::accelerator::getDeviceStats(static_cast<c10::DeviceIndex>(gpu));
    *bytes = static_cast<uint64_t>(stats.allocated_bytes[0].peak);
  });
}

}  // extern "C"
