// Varlen adaLN on the CPU, in float or double; forward also of bfloat16 rows, in float. Rows (T, D) are contiguous; a modulator's rows (B, D) may lie apart.
#pragma once

#include <cstdint>

namespace dcdit {

struct ModulateArgs {
    const int* cu;  // cu_seqlens (B + 1)
    int batch;
    int64_t features, gate_pitch, shift_pitch, scale_pitch;
    double eps;
    bool centred;  // LayerNorm; false: RMSNorm, which subtracts no mean
};

// sum = x + gate_b·y, and out = norm(sum)·weight·(1 + scale_b) + shift_b, where a missing weight (D,) is 1. Without y, sum
// is x; without out, sum alone.
template <class T, class Real>
void modulate(const ModulateArgs&, const T* x, const T* y, const Real* gate, const Real* shift, const Real* scale,
              const Real* weight, T* sum, T* out, int threads);

// From grad_sum and grad_out (either may be null): ∂x and ∂y by row; by sample (B, D) ∂gate, ∂shift and Σ ∂out·norm(sum),
// which is ∂scale / weight.
template <class Real>
void modulate_backward(const ModulateArgs&, const Real* sum, const Real* y, const Real* gate, const Real* scale,
                       const Real* weight, const Real* grad_sum, const Real* grad_out, Real* grad_x, Real* grad_y,
                       Real* grad_gate, Real* grad_shift, Real* grad_normed, int threads);

}  // namespace dcdit
