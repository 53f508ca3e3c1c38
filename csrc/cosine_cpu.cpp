// The 2D cosine score on the CPU: one pass for the norms of k, one over q and the nine neighbours of each cell.
#include "cosine.h"

#include <cmath>

#include "host.h"

namespace dcdit {
namespace {

constexpr int kTaps = 9;

template <class Real>
DCDIT_INLINE Real inverse_norm(const Real* x, int64_t width) {
    return Real(1) / std::max(std::sqrt(lane_sum<Real>(width, [&](int64_t d) { return x[d] * x[d]; })), Real(1e-12));
}

// Σ_d q[d]·Σ_t factor[t]·weight[t][d]·near[t][d].
template <class Real>
DCDIT_INLINE Real product(const Real* q, const Real* const* near, const Real* factor, const Real* weight, int64_t width) {
    typedef Real Vector __attribute__((vector_size(32), aligned(sizeof(Real)), may_alias));
    constexpr int kLanes = 32 / sizeof(Real);
    Vector total = {};
    int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes) {
        Vector sum = {};
#pragma GCC unroll 9
        for (int t = 0; t < kTaps; ++t)
            sum += factor[t] * (*reinterpret_cast<const Vector*>(weight + t * width + d) *
                                *reinterpret_cast<const Vector*>(near[t] + d));
        total += *reinterpret_cast<const Vector*>(q + d) * sum;
    }
    Real out = 0;
    for (int i = 0; i < kLanes; ++i) out += total[i];
    for (; d < width; ++d) {
        Real sum = 0;
        for (int t = 0; t < kTaps; ++t) sum += factor[t] * weight[t * width + d] * near[t][d];
        out += q[d] * sum;
    }
    return out;
}

// One row of the grid.
template <class Real>
struct Line {
    const Real *q, *k, *weight, *length;  // of the sample; length: 1 / |k|
    int64_t y, height, width, features;
};
template <class Real>
DCDIT_INLINE void score(const Line<Real>& a, Real* out) {
    for (int64_t x = 0; x < a.width; ++x) {
        const int64_t cell = a.y * a.width + x;
        const Real *near[kTaps], *q = a.q + cell * a.features;
        Real factor[kTaps];
        for (int t = 0; t < kTaps; ++t) {
            const int64_t ny = a.y + t / 3 - 1, nx = x + t % 3 - 1, other = ny * a.width + nx;
            const bool inside = ny >= 0 && ny < a.height && nx >= 0 && nx < a.width;
            near[t] = a.k + (inside ? other : cell) * a.features;
            factor[t] = inside ? a.length[other] : Real(0);
        }
        const Real p = (1 - product(q, near, factor, a.weight, a.features) * inverse_norm(q, a.features)) / 2;
        out[cell] = p < 0 ? Real(0) : p > 1 ? Real(1) : p;  // NaN stays
    }
}
DCDIT_CLONES void score_line(const Line<float>& a, float* out) { score(a, out); }
DCDIT_CLONES void score_line(const Line<double>& a, double* out) { score(a, out); }
DCDIT_CLONES float length_of(const float* x, int64_t width) { return inverse_norm(x, width); }
DCDIT_CLONES double length_of(const double* x, int64_t width) { return inverse_norm(x, width); }

}  // namespace

template <class Real>
void boundary_cosine(const CosineArgs& a, const Real* q, const Real* k, const Real* weight, Real* out, int threads) {
    const int64_t cells = a.height * a.width;
    std::vector<Real> length(a.batch * cells);
    share_runs(a.batch * cells, 64, threads, [&](int64_t first, int64_t last) {
        for (int64_t c = first; c < last; ++c) length[c] = length_of(k + c * a.features, a.features);
    });
    share_items(a.batch * a.height, threads, [&](int64_t i, int) {
        const int64_t y = i % a.height, cell0 = i / a.height * cells, at = cell0 * a.features;
        score_line(Line<Real>{q + at, k + at, weight, length.data() + cell0, y, a.height, a.width, a.features},
                   out + cell0);
    });
    for (int64_t b = 0; b < a.batch; ++b) out[b * cells] = out[(b + 1) * cells - 1] = Real(1);
}

template void boundary_cosine(const CosineArgs&, const float*, const float*, const float*, float*, int);
template void boundary_cosine(const CosineArgs&, const double*, const double*, const double*, double*, int);

}  // namespace dcdit
