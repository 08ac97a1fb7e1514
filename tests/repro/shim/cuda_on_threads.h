// Enough CUDA to run one kernel on the host: a thread of this process for each thread of a block, the blocks
// of a launch one after another.
//
// Threads meet at nothing but the kernel's own barriers while a block runs, so that ThreadSanitizer sees the
// kernel's races. Hence futexes: a mutex with a condition variable orders more threads than a barrier does
// (one that wakes late synchronises with one that has run ahead), and hides races that way.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <type_traits>
#include <unistd.h>

#include <atomic>

#define __global__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

static thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

// Exit statuses of the driver; Python reads them.
constexpr int kBadInput = 90, kDivergence = 91;

[[noreturn]] inline void fail(int status, const char* what) {
  std::fprintf(stderr, "shim: %s\n", what);
  std::fflush(stderr);
  _exit(status);
}

class Barrier {
 public:
  void reset(unsigned members) { state_.store(uint64_t(members) << 32); }
  void wait() {
    const uint32_t before = phase_.load(std::memory_order_relaxed);
    arrive(0, 1);
    while (phase_.load(std::memory_order_acquire) == before) {
      syscall(SYS_futex, &phase_, FUTEX_WAIT_PRIVATE, before, nullptr, nullptr, 0);
    }
  }
  // A thread that has returned no longer takes part, as on a GPU.
  void leave() { arrive(1, 0); }

 private:
  void arrive(unsigned gone, unsigned come) {
    uint64_t old = state_.load(std::memory_order_relaxed), next;
    bool full;
    do {
      const uint32_t members = uint32_t(old >> 32) - gone, arrived = uint32_t(old) + come;
      full = arrived == members;
      next = uint64_t(members) << 32 | (full ? 0 : arrived);
    } while (!state_.compare_exchange_weak(old, next, std::memory_order_acq_rel, std::memory_order_relaxed));
    if (full) {
      phase_.fetch_add(1, std::memory_order_release);
      syscall(SYS_futex, &phase_, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
    }
  }
  std::atomic<uint64_t> state_{0};  // members << 32 | arrived
  std::atomic<uint32_t> phase_{0};
};

// What the threads of the running block share.
constexpr unsigned kMaxThreads = 1024;
struct Block {
  Barrier block, warps[kMaxThreads], turn;
  unsigned passed[kMaxThreads];  // barriers of the block that each thread has passed
  void* shared;                  // the one __shared__ array of the kernel, on the heap: AddressSanitizer guards it
  size_t shared_bytes;
};
static Block now;
static thread_local unsigned self, warp_size;

template <typename T>
T* shared_array(size_t count) {
  if (count * sizeof(T) != now.shared_bytes) fail(kBadInput, "the __shared__ array is not of the expected size");
  return static_cast<T*>(now.shared);
}

inline void sync_block() {
  now.block.wait();
  now.passed[self]++;
}
inline void sync_warp() { now.warps[self / warp_size].wait(); }

struct Launch {
  dim3 grid, block;
  unsigned warp;
  int poison;  // what the __shared__ array holds when a block starts
  void (*kernel)(void*);
  void* arguments;
  unsigned threads() const { return block.x * block.y; }
};
struct Seat {
  const Launch* launch;
  unsigned thread;
};

inline void start_block(const Launch& launch) {
  const unsigned threads = launch.threads();
  now.block.reset(threads);
  for (unsigned first = 0; first < threads; first += launch.warp) {
    now.warps[first / launch.warp].reset(threads - first < launch.warp ? threads - first : launch.warp);
  }
  std::memset(now.passed, 0, sizeof now.passed);
  for (size_t i = 0; i < now.shared_bytes / sizeof(int); i++) static_cast<int*>(now.shared)[i] = launch.poison;
}

inline void end_block(const Launch& launch) {
  for (unsigned i = 1; i < launch.threads(); i++) {
    if (now.passed[i] != now.passed[0]) fail(kDivergence, "a thread returned before a barrier that others wait at");
  }
}

inline void* run_thread(void* argument) {
  const Seat& seat = *static_cast<Seat*>(argument);
  const Launch& launch = *seat.launch;
  self = seat.thread;
  warp_size = launch.warp;
  blockDim = launch.block;
  gridDim = launch.grid;
  threadIdx = {self % launch.block.x, self / launch.block.x, 0};
  for (unsigned y = 0; y < launch.grid.y; y++) {
    for (unsigned x = 0; x < launch.grid.x; x++) {
      now.turn.wait();
      if (self == 0) start_block(launch);
      now.turn.wait();
      blockIdx = {x, y, 0};
      launch.kernel(launch.arguments);
      now.block.leave();
      now.warps[self / warp_size].leave();
      now.turn.wait();
      if (self == 0) end_block(launch);
    }
  }
  return nullptr;
}

inline void run(const Launch& launch, size_t shared_bytes) {
  const unsigned threads = launch.threads();
  if (threads > kMaxThreads) fail(kBadInput, "more threads than a block may have");
  now.shared = std::malloc(shared_bytes);
  now.shared_bytes = shared_bytes;
  now.turn.reset(threads);
  auto* seats = new Seat[threads];
  auto* handles = new pthread_t[threads];
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, 1 << 18);
  for (unsigned i = 0; i < threads; i++) {
    seats[i] = {&launch, i};
    if (pthread_create(&handles[i], &attributes, run_thread, &seats[i])) fail(kBadInput, "no more threads");
  }
  for (unsigned i = 0; i < threads; i++) pthread_join(handles[i], nullptr);
  pthread_attr_destroy(&attributes);
  delete[] handles;
  delete[] seats;
  std::free(now.shared);
}

}  // namespace shim
