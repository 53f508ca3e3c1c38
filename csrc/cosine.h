// The 2D cosine score on the CPU, forward alone, in float or double. q, k (B, H·W, D) are contiguous.
#pragma once

#include <cstdint>

namespace dcdit {

struct CosineArgs {
    int64_t batch, height, width, features;
};

// out[c] = clamp((1 - q̂[c]·Σ_t weight[t]·k̂[c + t]) / 2, 0, 1) over the 3×3 neighbours t on the grid, with rows of length 1
// (norms of 1e-12 at least) and weight (9, D); 1 at the first and the last cell of a sample.
template <class Real>
void boundary_cosine(const CosineArgs&, const Real* q, const Real* k, const Real* weight, Real* out, int threads);

}  // namespace dcdit
