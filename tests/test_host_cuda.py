"""The player of CUDA kernels itself: what it computes, and that it notices what would go wrong on a GPU."""

import ctypes
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SOURCE = r"""
#include "device.h"

#include <bit>
#include <cmath>

using namespace fastcnn::cuda;

namespace {

int thread() { return static_cast<int>(threadIdx.x); }

// One warp multiplies a: (16, k) by b: (8, k)^T, with fragments as the PTX manual lays them out; `shift` moves a's
// second half of K to wrong columns.
template <class T>
void product(const T* a, const T* b, float* c, int shift) {
  constexpr int EACH = 4 / sizeof(T), HALF = 4 * EACH, K = 2 * HALF;
  const int row = thread() / 4, column = thread() % 4 * EACH;
  const auto pack = [](const T* from) { return *reinterpret_cast<const uint32_t*>(from); };
  const int second = (HALF + column + shift * EACH) % K;
  const uint32_t left[4] = {pack(a + row * K + column), pack(a + (row + 8) * K + column), pack(a + row * K + second),
                            pack(a + (row + 8) * K + second)};
  const uint32_t right[2] = {pack(b + row * K + column), pack(b + row * K + HALF + column)};
  float sums[4] = {};
  mma<T>(sums, left, right);
  for (int i = 0; i < 4; ++i) {
    c[(row + i / 2 * 8) * 8 + thread() % 4 * 2 + i % 2] = sums[i];
  }
}

// Each thread reads what its opposite wrote.
void reverse(const float* from, float* to, bool barrier) {
  auto* shared = reinterpret_cast<float*>(shared_memory());
  const int count = static_cast<int>(blockDim.x), index = static_cast<int>(blockIdx.x) * count;
  shared[thread()] = from[index + thread()];
  if (barrier) {
    __syncthreads();
  }
  to[index + thread()] = shared[count - 1 - thread()];
}

template <int BYTES>
void copy(const unsigned char* from, unsigned char* to, bool wait, bool valid, int offset) {
  copy_async<BYTES>(shared_memory() + thread() * BYTES, from + thread() * BYTES + offset, valid);
  commit_copies();
  if (wait) {
    wait_for_copies<0>();
  }
  for (int i = 0; i < BYTES; ++i) {
    to[thread() * BYTES + i] = shared_memory()[thread() * BYTES + i];
  }
}

// Two groups of copies, of which only the first has been waited for.
void two_groups(const float* from, float* to) {
  auto* shared = reinterpret_cast<float*>(shared_memory());
  for (int i = 0; i < 2; ++i) {
    copy_async<4>(shared + i, from + i, true);
    commit_copies();
  }
  wait_for_copies<1>();
  to[0] = shared[0];
  to[1] = shared[1];
}

void matrices(const uint16_t* from, uint32_t* to, bool transposed, int offset) {
  auto* shared = reinterpret_cast<uint16_t*>(shared_memory());
  for (int i = thread(); i < 256; i += 32) {
    shared[i] = from[i];
  }
  __syncwarp();
  uint32_t values[4];
  const auto* row = reinterpret_cast<const unsigned char*>(shared + thread() * 8) + offset;
  transposed ? load_matrices_transposed(values, row) : load_matrices(values, row);
  for (int i = 0; i < 4; ++i) {
    to[i * 32 + thread()] = values[i];
  }
}

// What lane l gets from each kind of shuffle of l.
void shuffles(int* to) {
  const int lane = thread() % 32;
  to[thread() * 4] = __shfl_sync(ALL_LANES, lane, 5);
  to[thread() * 4 + 1] = __shfl_xor_sync(ALL_LANES, lane, 3);
  to[thread() * 4 + 2] = __shfl_up_sync(ALL_LANES, lane, 2u);
  to[thread() * 4 + 3] = __shfl_down_sync(ALL_LANES, lane, 2u);
}

// Warp w sums its lanes' numbers w + 1 times over, with five shuffles each time; then the block adds up.
void uneven_warps(int* to) {
  auto* sums = reinterpret_cast<int*>(shared_memory());
  const int warp = thread() / 32;
  int total = 0;
  for (int i = 0; i <= warp; ++i) {
    int sum = 1;
    for (int mask = 16; mask > 0; mask /= 2) {
      sum += __shfl_xor_sync(ALL_LANES, sum, mask);
    }
    total += sum;
  }
  sums[warp] = total;
  __syncthreads();
  if (thread() == 0) {
    for (int i = 0; i < static_cast<int>(blockDim.x) / 32; ++i) {
      to[0] += sums[i];
    }
  }
}

const char* launch(const std::function<void()>& body, int blocks, int threads, int shared_bytes) {
  static std::string error;
  error.clear();
  try {
    host_cuda::launch(body, blocks, threads, shared_bytes);
  } catch (const std::exception& exception) {
    error = exception.what();
  }
  return error.c_str();
}

template <class T>
const char* launch_product(const void* a, const void* b, float* c, int shift) {
  return launch([=] { product(static_cast<const T*>(a), static_cast<const T*>(b), c, shift); }, 1, 32, 0);
}

}  // namespace

extern "C" {
const char* product_float32(const void* a, const void* b, float* c, int shift) {
  return launch_product<float>(a, b, c, shift);
}
const char* product_float16(const void* a, const void* b, float* c, int shift) {
  return launch_product<Half>(a, b, c, shift);
}
const char* product_bfloat16(const void* a, const void* b, float* c, int shift) {
  return launch_product<BFloat16>(a, b, c, shift);
}
float tf32(float value) { return std::bit_cast<float>(to_tf32(value)); }
const char* run_reverse(const float* from, float* to, bool barrier, int blocks, int threads, int shared_bytes) {
  return launch([=] { reverse(from, to, barrier); }, blocks, threads, shared_bytes);
}
const char* run_copy(const unsigned char* from, unsigned char* to, bool wait, bool valid, int offset, int bytes) {
  return launch([=] { (bytes == 16 ? copy<16> : bytes == 8 ? copy<8> : copy<4>)(from, to, wait, valid, offset); }, 1, 4,
                64);
}
const char* run_two_groups(const float* from, float* to) {
  return launch([=] { two_groups(from, to); }, 1, 1, 8);
}
const char* run_matrices(const uint16_t* from, uint32_t* to, bool transposed, int offset) {
  return launch([=] { matrices(from, to, transposed, offset); }, 1, 32, 528);
}
const char* run_shuffles(int* to) {
  return launch([=] { shuffles(to); }, 1, 64, 0);
}
const char* run_uneven_warps(int* to) {
  return launch([=] { uneven_warps(to); }, 1, 128, 16);
}
const char* read_unwritten(float* to) {
  return launch([=] { *to = reinterpret_cast<float*>(shared_memory())[0]; }, 1, 1, 4);
}
const char* barrier_of_some() {
  return launch([] { thread() < 40 ? __syncthreads() : void(); }, 1, 64, 0);
}
const char* warp_operation_of_some() {
  return launch([] { thread() < 20 ? __syncwarp() : void(); }, 1, 32, 0);
}
const char* barriers_of_two_kinds() {
  return launch([] { thread() < 20 ? __syncwarp() : __syncthreads(); }, 1, 32, 0);
}
}
"""
NAN, INF = math.nan, math.inf


@pytest.fixture(scope="module")
def player(tmp_path_factory):
    """Compile the kernels above against host_cuda.h, with torch's header-only types and nothing else of torch."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("host_cuda")
    (folder / "player.cpp").write_text(SOURCE)
    includes = [f"-I{ROOT / 'csrc' / 'cuda'}", f"-I{ROOT / 'tests' / 'host_cuda'}"]
    torch_headers = f"-isystem{Path(torch.__file__).parent / 'include'}"
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    command = [compiler, *flags, *includes, torch_headers, "player.cpp", "-o", "player.so"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(os.fspath(folder / "player.so"))


def play(function, *arguments):
    """Run one of the kernels above on tensors and numbers; return what the player complains of, or ''."""
    function.restype = ctypes.c_char_p
    return function(*(ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments)).decode()


def test_no_two_files_have_a_class_of_one_name():
    """A namespace holds one class of a name: two of them in headers would be told apart by chance."""
    homes = {}
    for file in [*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/math/*"), *ROOT.glob("csrc/cuda/*")]:
        for name in re.findall(
            r"^(?:struct|class|enum class) (?:alignas\(.*\) )?(\w+)", file.read_text(), re.MULTILINE
        ):
            homes.setdefault(name, set()).add(file.name)
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}


def multiply(player, dtype, shift):
    k = 8 if dtype == torch.float32 else 16
    a, b = (torch.randint(-8, 9, (rows, k)).to(dtype) for rows in (16, 8))
    c = torch.full((16, 8), NAN)
    name = str(dtype).removeprefix("torch.")
    assert play(getattr(player, f"product_{name}"), a, b, c, shift) == ""
    return c, a.float() @ b.float().T


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@DTYPES
def test_mma_multiplies(player, dtype):
    actual, expected = multiply(player, dtype, shift=0)
    assert torch.equal(actual, expected)


@DTYPES
def test_a_wrong_fragment_index_shows(player, dtype):
    actual, expected = multiply(player, dtype, shift=1)
    assert not torch.equal(actual, expected)


def test_float32_is_rounded_to_tf32_with_ties_away_from_zero(player):
    player.tf32.restype = ctypes.c_float

    def tf32(value):
        return player.tf32(ctypes.c_float(value))

    place = 2.0**-10
    assert [tf32(1 + k * place / 4) for k in range(5)] == [1, 1, 1 + place, 1 + place, 1 + place]
    assert tf32(-1 - place / 2) == -1 - place
    assert [tf32(INF), tf32(-INF), tf32(0.0)] == [INF, -INF, 0]
    assert math.isnan(tf32(NAN))


def test_a_product_looks_at_no_more_than_tf32(player):
    a, b, c = torch.zeros(16, 8), torch.zeros(8, 8), torch.full((16, 8), NAN)
    a[0, 0], b[0, 0] = 1 + 2**-11, 1.0
    play(player.product_float32, a, b, c, 0)
    assert c[0, 0] == 1


def reverse(player, barrier, blocks=1, threads=64, shared_bytes=256):
    values = torch.arange(1.0, blocks * threads + 1)
    to = torch.zeros_like(values)
    error = play(player.run_reverse, values, to, barrier, blocks, threads, shared_bytes)
    return error, torch.equal(to.view(blocks, threads), values.view(blocks, threads).flip(1))


def test_a_block_barrier_orders_writes_and_reads(player):
    assert reverse(player, barrier=True, blocks=3) == ("", True)


def test_a_missing_block_barrier_shows_in_either_order_of_threads(player):
    assert reverse(player, barrier=False, blocks=1) == ("", False)
    assert reverse(player, barrier=False, blocks=1) == ("", False)


def test_shared_memory_that_nobody_wrote_is_nan(player):
    value = torch.zeros(1)
    assert play(player.read_unwritten, value) == ""
    assert value.isnan().all()


def test_blocks_that_no_gpu_runs_are_refused(player):
    assert "no GPU" in reverse(player, barrier=True, threads=1025, shared_bytes=8192)[0]
    assert "no GPU" in reverse(player, barrier=True, shared_bytes=228 * 1024)[0]


@pytest.mark.parametrize("kernel", ["barrier_of_some", "warp_operation_of_some", "barriers_of_two_kinds"])
def test_barriers_that_some_threads_never_reach(player, kernel):
    assert "never reach" in play(getattr(player, kernel))


def copied(player, wait=True, valid=True, offset=0, bytes=16):
    values = torch.arange(1, 81, dtype=torch.uint8)
    values = values[-values.data_ptr() % 16 :]
    to = torch.zeros(4 * bytes, dtype=torch.uint8)
    error = play(player.run_copy, values, to, wait, valid, offset, bytes)
    return error, to.tolist(), values[: 4 * bytes].tolist()


@pytest.mark.parametrize("bytes", [16, 8, 4])
def test_asynchronous_copies(player, bytes):
    error, to, values = copied(player, bytes=bytes)
    assert (error, to) == ("", values)
    assert copied(player, valid=False, bytes=bytes)[:2] == ("", [0] * 4 * bytes)


def test_a_copy_that_is_not_waited_for_has_not_arrived(player):
    assert copied(player, wait=False)[:2] == ("", [255] * 64)  # NaN


def test_waiting_for_all_groups_but_one(player):
    to = torch.zeros(2)
    assert play(player.run_two_groups, torch.tensor([3.0, 4.0]), to) == ""
    assert to[0] == 3
    assert to[1].isnan()


@pytest.mark.parametrize("bytes", [16, 8, 4])
def test_misaligned_copies_are_refused(player, bytes):
    assert "misaligned" in copied(player, offset=bytes // 2, bytes=bytes)[0]


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
def test_ldmatrix(player, transposed):
    values = torch.randint(0, 2**15, (4, 8, 8), dtype=torch.int16)
    to = torch.zeros(4, 32, dtype=torch.int32)
    assert play(player.run_matrices, values, to, transposed, 0) == ""
    expected = values.mT if transposed else values
    assert torch.equal(to.view(torch.int16).view(4, 8, 8), expected.contiguous())
    assert "misaligned" in play(player.run_matrices, values, to, transposed, 8)


def test_shuffles(player):
    to = torch.full((64, 4), -1, dtype=torch.int32)
    assert play(player.run_shuffles, to) == ""
    lanes = range(32)
    up, down = [0, 1, *range(30)], [*range(2, 32), 30, 31]
    expected = torch.tensor([[5, lane ^ 3, up[lane], down[lane]] for lane in lanes], dtype=torch.int32)
    assert torch.equal(to, expected.repeat(2, 1))


def test_warps_that_differ_in_what_they_do_between_two_block_barriers(player):
    total = torch.zeros(1, dtype=torch.int32)
    assert play(player.run_uneven_warps, total) == ""
    assert total.item() == 32 * (1 + 2 + 3 + 4)
