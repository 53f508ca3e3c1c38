// Varlen adaLN on the CPU, in float or double. Rows (T, D) are contiguous; a modulator's rows (B, D) may lie apart.
#pragma once

#include <cstdint>

namespace dcdit {

struct ModulateArgs {
    const int* cu;  // cu_seqlens (B + 1)
    int batch;
    int64_t features, gate_pitch, shift_pitch, scale_pitch;
    double eps;
};

// sum = x + gate_b·y, and out = LayerNorm(sum)·(1 + scale_b) + shift_b. Without y, sum is x; without out, sum alone.
template <class Real>
void modulate(const ModulateArgs&, const Real* x, const Real* y, const Real* gate, const Real* shift, const Real* scale,
              Real* sum, Real* out, int threads);

// From grad_sum and grad_out (either may be null): ∂x and ∂y by row; ∂gate, ∂shift and ∂scale (B, D) by sample.
template <class Real>
void modulate_backward(const ModulateArgs&, const Real* sum, const Real* y, const Real* gate, const Real* scale,
                       const Real* grad_sum, const Real* grad_out, Real* grad_x, Real* grad_y, Real* grad_gate,
                       Real* grad_shift, Real* grad_scale, int threads);

}  // namespace dcdit
