// Functions that the bindings call. Nothing here allocates: outputs and scratch come from the caller.
#pragma once

#include <array>
#include <cstdint>

#include "plan.h"

namespace dcdit {

// Rows of `bytes` bytes each: out[i] = x[index[i]], zero where index[i] is -1; to scatter, out[index[i]] = x[i] into a
// zeroed out, and -1 goes nowhere.
struct RowArgs {
    const char* x;
    int64_t x_pitch;  // bytes from one row to the next
    const int64_t* index;
    char* out;
    int64_t out_pitch;
    int64_t rows;
    int64_t bytes;
    int64_t limit;  // every index is below
    bool scatter;
};

// The CPU: one thread per sample, `threads` at a time; `block` threads in a sample's block (1, or more in tests).
void plan_count_cpu(const CountArgs& args, bool is_double, int threads, int block);
void plan_fill_cpu(const FillArgs& args, int threads, int block);
void move_rows_cpu(const RowArgs& args, int threads);

#ifdef DCDIT_CUDA
// CUDA, on the current device and the given stream. Return an error's text, or null.
const char* plan_count_cuda(const CountArgs& args, bool is_double, void* stream);
const char* plan_fill_cuda(const FillArgs& args, void* stream);
const char* move_rows_cuda(const RowArgs& args, void* stream);
// CUDA of the build, and the newest the driver knows (0 without a driver), as 1000·major + 10·minor.
std::array<int, 2> cuda_versions();
#endif

}  // namespace dcdit
