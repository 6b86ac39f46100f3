#pragma once
// CUDA kernels on the CPU, for tests: one block at a time, its threads are coroutines that take turns.
//
// What it plays: block and warp barriers (apart, so that warps may differ in what they do between two block barriers),
// shuffles, dynamic shared memory (poisoned with NaN), asynchronous copies (they land when waited for, and poison their
// target until then), ldmatrix, and the mma shapes of csrc/cuda/device.h. It stops with an error at barriers that some
// threads never reach and at misaligned accesses of these functions; AddressSanitizer and UBSan see the others.
// Threads take turns forwards in one block and backwards in the next, so that a missing barrier shows as a wrong value.
// Not seen: races that no such order shows, timing.

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

namespace host_cuda {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
struct Extent {
  unsigned x = 1, y = 1, z = 1;
};

constexpr int LANES = 32;
constexpr size_t STACK_BYTES = 256 * 1024;
constexpr unsigned char POISON = 0xff;  // NaN in every floating-point type

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool valid;
};

enum class State { READY, AT_WARP_BARRIER, AT_BLOCK_BARRIER, DONE };

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(STACK_BYTES);
  State state = State::READY;
  int operation = 0;  // warp-wide operations so far: two sets of slots take turns
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open;
};

struct Slot {
  alignas(16) unsigned char bytes[32];
};

// The block that is being played. One definition for the whole library, whatever the number of files.
struct Block {
  std::vector<Thread> threads;
  std::vector<Slot> slots;  // what a thread shows its warp in a warp-wide operation
  std::vector<unsigned char> shared;
  std::function<void()> body;
  std::string error;
  ucontext_t scheduler;
  int current = 0;
  Index thread, block;
  Extent block_size, grid_size;
  int64_t launches = 0;
};
inline Block playing;

inline int lane() { return playing.current % LANES; }
inline Thread& self() { return playing.threads[playing.current]; }

// AddressSanitizer must be told of every change of stacks.
inline void switch_context(ucontext_t* from, ucontext_t* to, bool leaves_for_good = false) {
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(leaves_for_good ? nullptr : &fake_stack, to->uc_stack.ss_sp, to->uc_stack.ss_size);
  swapcontext(from, to);
  const void* bottom = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(fake_stack, &bottom, &size);
  if (from == &playing.scheduler) {
    return;
  }
  playing.scheduler.uc_stack.ss_sp = const_cast<void*>(bottom);
  playing.scheduler.uc_stack.ss_size = size;
#else
  (void)leaves_for_good;
  swapcontext(from, to);
#endif
}

inline void pause(State state) {
  self().state = state;
  switch_context(&self().context, &playing.scheduler, state == State::DONE);
}

// Stop the launch with an error: the scheduler throws it, outside of the coroutines.
inline void fail(const std::string& message) {
  playing.error = message;
  pause(State::DONE);
}

inline void enter() {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  playing.scheduler.uc_stack.ss_sp = const_cast<void*>(bottom);
  playing.scheduler.uc_stack.ss_size = size;
#endif
  playing.body();
  pause(State::DONE);
}

inline void resume(int thread) {
  playing.current = thread;
  playing.thread.x = static_cast<unsigned>(thread);
  switch_context(&playing.scheduler, &playing.threads[thread].context);
  if (!playing.error.empty()) {
    throw std::runtime_error("host_cuda: " + playing.error);
  }
}

inline void start_threads(int count) {
  playing.threads.resize(count);
  playing.slots.resize(2 * count);
  for (Thread& thread : playing.threads) {
    thread.state = State::READY;
    thread.operation = 0;
    thread.groups.clear();
    thread.open.clear();
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
  }
}

inline int count(int begin, int end, State state) {
  int found = 0;
  for (int i = begin; i < end; ++i) {
    found += playing.threads[i].state == state;
  }
  return found;
}

inline void release(int begin, int end) {
  for (int i = begin; i < end; ++i) {
    playing.threads[i].state = State::READY;
  }
}

// Let a warp's threads run until each is done or at a block barrier.
inline void run_warp(int begin, int end, bool backwards) {
  for (;;) {
    for (int i = begin; i < end; ++i) {
      const int thread = backwards ? begin + end - 1 - i : i;
      if (playing.threads[thread].state == State::READY) {
        resume(thread);
      }
    }
    const int waiting = count(begin, end, State::AT_WARP_BARRIER);
    if (waiting == 0) {
      return;
    }
    if (waiting != end - begin) {
      throw std::runtime_error("host_cuda: a warp-wide operation that some threads of the warp never reach");
    }
    release(begin, end);
  }
}

inline void run_block(bool backwards) {
  const int threads = static_cast<int>(playing.threads.size());
  const int warps = (threads + LANES - 1) / LANES;
  for (;;) {
    for (int i = 0; i < warps; ++i) {
      const int warp = backwards ? warps - 1 - i : i;
      run_warp(warp * LANES, std::min((warp + 1) * LANES, threads), backwards);
    }
    const int waiting = count(0, threads, State::AT_BLOCK_BARRIER);
    if (waiting == 0) {
      return;
    }
    if (waiting != threads) {
      throw std::runtime_error("host_cuda: a block barrier that some threads never reach");
    }
    release(0, threads);
  }
}

// Play body() as every thread of every block.
inline void launch(std::function<void()> body, int64_t blocks, int threads, int64_t shared_bytes) {
  if (threads < 1 || threads > 1024 || shared_bytes > 227 * 1024) {
    throw std::runtime_error("host_cuda: no GPU can run such a block");
  }
  playing.body = std::move(body);
  playing.error.clear();
  playing.block_size.x = static_cast<unsigned>(threads);
  playing.grid_size.x = static_cast<unsigned>(blocks);
  ++playing.launches;
  for (int64_t block = 0; block < blocks; ++block) {
    playing.block.x = static_cast<unsigned>(block);
    // exactly as much as was asked for, so that AddressSanitizer sees what goes over
    playing.shared = std::vector<unsigned char>();
    playing.shared.assign(shared_bytes, POISON);
    start_threads(threads);
    run_block((block + playing.launches) % 2 == 0);
  }
}

// Show `mine` to the warp; afterwards shown<T>(lane) is what another lane shows, until the operation after the next.
template <class T>
void show(const T& mine) {
  static_assert(sizeof(T) <= sizeof(Slot));
  const int set = self().operation++ % 2;
  std::memcpy(playing.slots[2 * playing.current + set].bytes, &mine, sizeof(T));
  pause(State::AT_WARP_BARRIER);
}

template <class T>
T shown(int lane) {
  const int set = (self().operation - 1) % 2, thread = playing.current / LANES * LANES + lane;
  T value;
  std::memcpy(&value, playing.slots[2 * thread + set].bytes, sizeof(T));
  return value;
}

template <class T>
T shuffle(T value, int from) {
  show(value);
  return shown<T>(from);
}

inline bool misaligned(const void* pointer, int bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes != 0; }

inline unsigned char* shared_memory() { return playing.shared.data(); }

template <int BYTES, bool AGAIN = false>
void copy_async(void* to, const void* from, bool valid) {
  static_assert(BYTES == 16 || BYTES == 8 || BYTES == 4);
  if (misaligned(to, BYTES) || (valid && misaligned(from, BYTES))) {
    fail("copy_async of misaligned memory");
  }
  std::memset(to, POISON, BYTES);
  self().open.push_back({to, from, BYTES, valid});
}

inline void commit_copies() {
  self().groups.push_back(std::move(self().open));
  self().open.clear();
}

template <int PENDING>
void wait_for_copies() {
  auto& groups = self().groups;
  while (groups.size() > PENDING) {
    for (const Copy& copy : groups.front()) {
      if (copy.valid) {
        std::memcpy(copy.to, copy.from, copy.bytes);
      } else {
        std::memset(copy.to, 0, copy.bytes);
      }
    }
    groups.pop_front();
  }
}

inline void load_matrices(uint32_t (&values)[4], const void* row) {
  if (misaligned(row, 16)) {
    fail("ldmatrix of a misaligned row");
  }
  show(row);
  for (int matrix = 0; matrix < 4; ++matrix) {
    const auto* from = static_cast<const unsigned char*>(shown<const void*>(matrix * 8 + lane() / 4));
    std::memcpy(&values[matrix], from + lane() % 4 * 4, 4);
  }
}

inline void load_matrices_transposed(uint32_t (&values)[4], const void* row) {
  if (misaligned(row, 16)) {
    fail("ldmatrix of a misaligned row");
  }
  show(row);
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const auto* from = static_cast<const unsigned char*>(shown<const void*>(matrix * 8 + lane() % 4 * 2 + i));
      std::memcpy(&pair[i], from + lane() / 4 * 2, 2);
    }
    std::memcpy(&values[matrix], pair, 4);
  }
}

// Rounded to 10 bits of mantissa, ties away from zero.
inline uint32_t to_tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return std::isfinite(value) ? (bits + 0x1000u) & 0xffffe000u : bits;
}

// Element `which` of a register, of the type that mma multiplies.
template <class T>
float element(uint32_t packed, int which) {
  if constexpr (sizeof(T) == 4) {
    packed &= 0xffffe000u;  // the hardware does not look at the other bits
    float value;
    std::memcpy(&value, &packed, 4);
    return value;
  } else {
    const auto bits = static_cast<uint16_t>(packed >> (16 * which));
    return static_cast<float>(T(bits, T::from_bits()));
  }
}

inline int multiprocessors() { return 1; }  // so that tiny tensors are work enough for every way of cutting it

struct Fragments {
  uint32_t a[4], b[2];
};

// Fragments as the PTX manual lays them out: m16n8k16 of 16-bit elements, two a register, or m16n8k8 of TF32.
template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  constexpr int EACH = 4 / sizeof(T), DEPTH = 8 * EACH;  // elements a register; k
  Fragments mine;
  std::memcpy(mine.a, a, sizeof(a));
  std::memcpy(mine.b, b, sizeof(b));
  show(mine);
  Fragments warp[LANES];
  for (int i = 0; i < LANES; ++i) {
    warp[i] = shown<Fragments>(i);
  }
  const int row = lane() / 4, column = lane() % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    const int m = row + i / 2 * 8, n = column + i % 2;
    for (int k = 0; k < DEPTH; ++k) {
      const int lane_of_k = k % (4 * EACH) / EACH, half = k / (4 * EACH);
      c[i] += element<T>(warp[m % 8 * 4 + lane_of_k].a[m / 8 + half * 2], k % EACH) *
              element<T>(warp[n * 4 + lane_of_k].b[half], k % EACH);
    }
  }
}

}  // namespace host_cuda

#define threadIdx (host_cuda::playing.thread)
#define blockIdx (host_cuda::playing.block)
#define blockDim (host_cuda::playing.block_size)
#define gridDim (host_cuda::playing.grid_size)

inline void __syncthreads() { host_cuda::pause(host_cuda::State::AT_BLOCK_BARRIER); }
inline void __syncwarp() { host_cuda::pause(host_cuda::State::AT_WARP_BARRIER); }

template <class T>
T __shfl_sync(unsigned, T value, int from) {
  return host_cuda::shuffle(value, from % host_cuda::LANES);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return host_cuda::shuffle(value, host_cuda::lane() ^ mask);
}
template <class T>
T __shfl_up_sync(unsigned, T value, unsigned distance) {
  const int from = host_cuda::lane() - static_cast<int>(distance);
  return host_cuda::shuffle(value, from < 0 ? host_cuda::lane() : from);
}
template <class T>
T __shfl_down_sync(unsigned, T value, unsigned distance) {
  const int from = host_cuda::lane() + static_cast<int>(distance);
  return host_cuda::shuffle(value, from >= host_cuda::LANES ? host_cuda::lane() : from);
}
