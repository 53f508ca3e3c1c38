// The dechunk on the CPU, in float or double; its result also in bfloat16. Rows are contiguous; threads share runs of rows and no sum is shared.
#pragma once

#include <cstdint>

namespace dcdit {

struct WindowArgs {
    const int *token, *sample, *cu;
    int64_t rows, features;  // live rows
    int frames, height, width, radius;
    double sigma;
};

// out[i] = Σ_j k_ij weight[j] x[j] and total[i] = Σ_j k_ij weight[j], k_ij = exp(-|u_i - u_j|²/2σ²), over the retained
// cells j ≠ i of i's sample at most `radius` away on each axis. With features = 0 the totals alone.
template <class Real>
void window_sum(const WindowArgs&, const Real* x, const Real* weight, Real* out, Real* total, int threads);

struct PlugArgs {
    const int *nearest, *offsets, *member;
    int64_t cells, rows, features;  // all cells of the batch, live rows
};

// out[c] = rows[nearest[c]] + residual[c]; either may be missing (nearest[c] < 0, residual null).
template <class T, class Real>
void plug(const PlugArgs&, const Real* rows, const Real* residual, T* out, int threads);

// grad_rows[r] = Σ grad[c] and through[c] = grad[c]·rows[r] over the cells c that row r refills.
template <class Real>
void plug_backward(const PlugArgs&, const Real* grad, const Real* rows, Real* grad_rows, Real* through, int threads);

}  // namespace dcdit
