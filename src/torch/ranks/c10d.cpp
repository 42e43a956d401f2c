// A C interface to c10d's Gloo process group, and to the streams of LibTorch's accelerator. Every function that can fail returns null or false and sets `error` to a text;
// free it with `interlace_text_free`.

#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include <ATen/DeviceAccelerator.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#include <torch/types.h>

namespace {

struct Group {
  c10::intrusive_ptr<c10d::Store> store;
  c10::intrusive_ptr<c10d::Backend> backend;
};

template <typename F>
auto caught(char** error, F work) -> decltype(work()) {
  try {
    return work();
  } catch (const std::exception& e) {
    // Does not name c10's own class: its type would link libc10 to programs that never call this function.
    *error = strdup(e.what());
  } catch (...) {
    *error = strdup("an exception of unknown kind");
  }
  return {};
}

// The same storage without autograd history; collectives refuse to write to tensors with one.
std::vector<at::Tensor> storage(const torch::Tensor* tensor) { return {tensor->detach()}; }

}  // namespace

extern "C" {

// `listener` is a bound socket on which this process serves the store, or -1 when another process serves it.
Group* interlace_group_new(const char* host, uint16_t port, int listener, const char* prefix, const char* own_address,
                           int rank, int size, int64_t timeout_ms, char** error) {
  return caught(error, [&]() -> Group* {
    const auto timeout = std::chrono::milliseconds(timeout_ms);
    c10d::TCPStoreOptions options;
    options.port = port;
    options.isServer = listener >= 0;
    options.waitWorkers = false;
    options.timeout = timeout;
    if (listener >= 0) options.masterListenFd = listener;
    auto store = c10::make_intrusive<c10d::TCPStore>(host, options);
    auto prefixed = c10::make_intrusive<c10d::PrefixStore>(prefix, store);
    auto gloo = c10d::ProcessGroupGloo::Options::create(timeout);
    gloo->devices.push_back(c10d::ProcessGroupGloo::createDeviceForHostname(own_address));
    auto backend = c10::make_intrusive<c10d::ProcessGroupGloo>(prefixed, rank, size, gloo);
    return new Group{prefixed, backend};
  });
}

void interlace_group_free(Group* group) { delete group; }

bool interlace_group_sum(Group* group, const torch::Tensor* tensor, char** error) {
  return caught(error, [&]() -> bool {
    auto tensors = storage(tensor);
    group->backend->allreduce(tensors)->wait();
    return true;
  });
}

bool interlace_group_broadcast(Group* group, const torch::Tensor* tensor, int root, char** error) {
  return caught(error, [&]() -> bool {
    auto tensors = storage(tensor);
    c10d::BroadcastOptions options;
    options.rootRank = root;
    group->backend->broadcast(tensors, options)->wait();
    return true;
  });
}

// Makes a GPU the calling thread's device, and gives the stream on which LibTorch computes there. `*stream` is a cudaStream_t;
// that of the default stream is null.
bool interlace_stream(int gpu, void** stream, char** error) {
  return caught(error, [&]() -> bool {
    at::accelerator::setDeviceIndex(static_cast<c10::DeviceIndex>(gpu));
    *stream = at::accelerator::getCurrentStream(static_cast<c10::DeviceIndex>(gpu)).native_handle();
    return true;
  });
}

// Whether everything queued on that stream is done.
bool interlace_stream_idle(int gpu, bool* idle, char** error) {
  return caught(error, [&]() -> bool {
    *idle = at::accelerator::getCurrentStream(static_cast<c10::DeviceIndex>(gpu)).query();
    return true;
  });
}

// The size of c10d's class according to the declarations of Gloo in this folder.
size_t interlace_group_layout() { return sizeof(c10d::ProcessGroupGloo); }

void interlace_text_free(char* text) { free(text); }

}  // extern "C"
