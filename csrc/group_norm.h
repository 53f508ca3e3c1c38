// GroupNorm–SiLU on the CPU, in float or double; forward also of bfloat16 features, in float. Features (B, cells, C) are contiguous: a picture's, channels last.
#pragma once

#include <cstdint>

namespace dcdit {

struct GroupNormArgs {
    int64_t batch, cells, channels, groups, cond_pitch;  // cond's rows (B, C) may lie apart
    double eps;
};

// out = SiLU(z), z = norm(x + cond_b + x_bias)·weight + bias; cond and x_bias may be null.
template <class T, class Real>
void group_norm_silu(const GroupNormArgs&, const T* x, const Real* weight, const Real* bias, const Real* cond,
                     const Real* x_bias, T* out, int threads);

// From ∂out: ∂x, and by sample (B, 3, C) ∂weight, ∂bias and ∂cond, whose sums over samples are those of weight, bias and
// x_bias.
template <class Real>
void group_norm_silu_backward(const GroupNormArgs&, const Real* grad, const Real* x, const Real* weight,
                              const Real* bias, const Real* cond, const Real* x_bias, Real* grad_x, Real* grad_rest,
                              int threads);

}  // namespace dcdit
