// The CUDA executor: a block of threads per sample. Three launches for a plan: count, place, fill.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "fill.h"
#include "launch.h"

namespace dcdit {
namespace {

constexpr int kThreads = 1024;
constexpr int64_t kSharedBytes = 32 * 1024;  // with Shared below the 48 KiB that need no opt-in

struct CudaBlock {
    static constexpr int size = kThreads, lanes = 32;

    template <class F>
    __device__ __forceinline__ void each(F f) {
        f(int(threadIdx.x));
        __syncthreads();
    }
    __device__ __forceinline__ void barrier() { __syncthreads(); }
    __device__ __forceinline__ void add(int* p, int x) { atomicAdd(p, x); }
    __device__ __forceinline__ void add_if(bool hit, int* p, int x) {
        if (hit) atomicAdd(p, x);
    }
    __device__ __forceinline__ void max(int* p, int x) { atomicMax(p, x); }
    __device__ __forceinline__ void set(unsigned* p, unsigned bits) { atomicOr(p, bits); }

    // A gang is a warp. Of its threads with an equal i the first adds for all.
    __device__ __forceinline__ int count_one_more(bool own, int* count, int i) {
        const unsigned owners = __ballot_sync(~0u, own);
        int before = 0;
        if (own) {
            const unsigned peers = __match_any_sync(owners, i), lane = threadIdx.x % 32;
            const int rank = __popc(peers & ((1u << lane) - 1));
            before = count[i] + rank;
            __syncwarp(owners);
            if (rank == 0) count[i] += __popc(peers);
        }
        __syncwarp();
        return before;
    }

    // Sums within each warp, then of the warps.
    __device__ __forceinline__ void inclusive_scan(int64_t* values) {
        __shared__ int64_t warps[32];
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const int64_t sum = within_warp(values[threadIdx.x], lane);
        if (lane == 31) warps[warp] = sum;
        __syncthreads();
        if (warp == 0) warps[lane] = within_warp(warps[lane], lane);
        __syncthreads();
        values[threadIdx.x] = sum + (warp ? warps[warp - 1] : 0);
        __syncthreads();
    }

    __device__ __forceinline__ static int64_t within_warp(int64_t value, int lane) {
        for (int away = 1; away < 32; away *= 2) {
            const int64_t other = __shfl_up_sync(0xffffffffu, value, away);
            if (lane >= away) value += other;
        }
        return value;
    }
};

// All blocks of a cooperative launch, or a block alone where nothing waits for others.
struct CudaGrid {
    CudaBlock& exec;
    Shared<kThreads>& shared;

    template <class F>
    __device__ __forceinline__ void each(int count, F f) {
        for (int i = blockIdx.x; i < count; i += gridDim.x) f(exec, shared, i);
        cooperative_groups::this_grid().sync();
    }
    template <class F>
    __device__ __forceinline__ auto all(F f) { return f(exec, shared); }
    template <class F>
    __device__ __forceinline__ void first(F f) {
        if (blockIdx.x == 0) f(exec, shared);
    }
};

template <class Real>
__global__ void __launch_bounds__(kThreads, 1) plan_count_kernel(const __grid_constant__ CountArgs a) {
    __shared__ Shared<kThreads> shared;
    CudaBlock exec;
    count_sample<Real>(exec, shared, a, blockIdx.x);
}

template <class Real>
__global__ void __launch_bounds__(kThreads, 1) plan_place_kernel(const __grid_constant__ CountArgs a) {
    __shared__ Shared<kThreads> shared;
    CudaBlock exec;
    CudaGrid grid{exec, shared};
    place_samples<Real>(grid, a);
}

__global__ void __launch_bounds__(kThreads, 1) plan_fill_kernel(const __grid_constant__ FillArgs a, int64_t scratch, bool in_shared) {
    extern __shared__ int fast[];
    __shared__ Shared<kThreads> shared;
    CudaBlock exec;
    if (blockIdx.x < a.batch) fill_sample(exec, shared, a, blockIdx.x, in_shared ? fast : a.scratch + blockIdx.x * scratch);
    fill_tail(exec, a, blockIdx.x, gridDim.x);
}

// Where rows may be too few, the place kernel has a block for each sample, or for each SM, all of them running at once.
template <class Real>
void count_and_place(const CountArgs& a, cudaStream_t stream) {
    if (a.batch) plan_count_kernel<Real><<<a.batch, kThreads, 0, stream>>>(a);
    int device = 0, processors = 1;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    cudaLaunchAttribute together{};
    together.id = cudaLaunchAttributeCooperative;
    together.val.cooperative = a.sums != nullptr;
    cudaLaunchConfig_t config{};
    config.gridDim = a.sums ? std::max(1, std::min(a.batch, processors)) : 1;
    config.blockDim = kThreads;
    config.stream = stream;
    config.attrs = &together;
    config.numAttrs = 1;
    cudaLaunchKernelEx(&config, plan_place_kernel<Real>, a);
}

const char* last_error() {
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

std::array<int, 2> cuda_versions() {
    int driver = 0;
    if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
    return {CUDART_VERSION, driver};
}

const char* plan_count_cuda(const CountArgs& a, bool is_double, void* stream) {
    (is_double ? count_and_place<double> : count_and_place<float>)(a, static_cast<cudaStream_t>(stream));
    return last_error();
}

const char* plan_fill_cuda(const FillArgs& a, void* stream) {
    const int64_t ints = scratch_ints(a.cells, a.axes, kThreads);
    const bool in_shared = ints * int64_t(sizeof(int)) <= kSharedBytes;
    const size_t bytes = in_shared ? ints * sizeof(int) : 0;
    plan_fill_kernel<<<std::max(a.batch, 1), kThreads, bytes, static_cast<cudaStream_t>(stream)>>>(a, ints, in_shared);
    return last_error();
}

}  // namespace dcdit
