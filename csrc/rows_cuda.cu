// Row gather and scatter on CUDA: a warp per row, in the widest accesses that addresses and pitches allow.
#include <cuda_runtime.h>

#include <algorithm>

#include "launch.h"

namespace dcdit {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 16;

template <class Word>
__global__ void __launch_bounds__(kThreads) move_rows_kernel(const __grid_constant__ RowArgs a) {
    const int lane = threadIdx.x % 32;
    const int64_t warps = int64_t(gridDim.x) * (kThreads / 32), words = a.bytes / int64_t(sizeof(Word));
    for (int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / 32; i < a.rows; i += warps) {
        const int64_t row = a.index[i];
        if (row < -1 || row >= a.limit) __trap();  // as PyTorch does: reading elsewhere would be silent
        if (a.scatter && row < 0) continue;
        const auto* x = reinterpret_cast<const Word*>(a.x + (a.scatter ? i : row) * a.x_pitch);
        auto* out = reinterpret_cast<Word*>(a.out + (a.scatter ? row : i) * a.out_pitch);
        for (int64_t w = lane; w < words; w += 32) out[w] = row < 0 ? Word{} : x[w];
    }
}

}  // namespace

const char* move_rows_cuda(const RowArgs& a, void* stream) {
    if (a.rows == 0 || a.bytes == 0) return nullptr;
    const auto s = static_cast<cudaStream_t>(stream);
    const int blocks = int(std::min(kMaxBlocks, (a.rows * 32 + kThreads - 1) / kThreads));
    const uint64_t together = reinterpret_cast<uint64_t>(a.x) | reinterpret_cast<uint64_t>(a.out) | uint64_t(a.x_pitch) |
                              uint64_t(a.out_pitch) | uint64_t(a.bytes);
    if (together % 16 == 0) move_rows_kernel<uint4><<<blocks, kThreads, 0, s>>>(a);
    else if (together % 4 == 0) move_rows_kernel<uint32_t><<<blocks, kThreads, 0, s>>>(a);
    else move_rows_kernel<uint8_t><<<blocks, kThreads, 0, s>>>(a);
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace dcdit
