// The dechunk on the CPU: Gaussian sums over the retained cells near each one, plug-back, and plug-back's gradient.
#include "dechunk.h"

#include <cmath>

#include "host.h"

namespace dcdit {
namespace {

// out[d] = Σ weight[i]·row[i][d]; a piece of `out` stays in eight registers while all rows pass.
template <class Real>
DCDIT_INLINE void mix(const Real* const* row, const Real* weight, int count, int64_t width, Real* out) {
    typedef Real Vector __attribute__((vector_size(32), aligned(sizeof(Real)), may_alias));
    constexpr int kLanes = 32 / sizeof(Real), kPiece = 8 * kLanes;
    int64_t start = 0;
    for (; start + kPiece <= width; start += kPiece) {
        Vector sum[8] = {};
        for (int i = 0; i < count; ++i) {
            const Vector* x = reinterpret_cast<const Vector*>(row[i] + start);
#pragma GCC unroll 8
            for (int v = 0; v < 8; ++v) sum[v] += weight[i] * x[v];
        }
#pragma GCC unroll 8
        for (int v = 0; v < 8; ++v) reinterpret_cast<Vector*>(out + start)[v] = sum[v];
    }
    for (; start < width; ++start) {
        Real sum = 0;
        for (int i = 0; i < count; ++i) sum += weight[i] * row[i][start];
        out[start] = sum;
    }
}
DCDIT_CLONES void mix_rows(const float* const* row, const float* weight, int count, int64_t width, float* out) {
    mix(row, weight, count, width, out);
}
DCDIT_CLONES void mix_rows(const double* const* row, const double* weight, int count, int64_t width, double* out) {
    mix(row, weight, count, width, out);
}

// sum += x; returns Σ x[d]·y[d].
template <class Real>
DCDIT_INLINE Real add_and_dot(const Real* x, const Real* y, int64_t width, Real* sum) {
    return lane_sum<Real>(width, [&](int64_t d) {
        sum[d] += x[d];
        return x[d] * y[d];
    });
}
DCDIT_CLONES float take(const float* x, const float* y, int64_t width, float* sum) {
    return add_and_dot(x, y, width, sum);
}
DCDIT_CLONES double take(const double* x, const double* y, int64_t width, double* sum) {
    return add_and_dot(x, y, width, sum);
}

// to = row + rest.
template <class T, class Real>
DCDIT_INLINE void add_into(const Real* row, const Real* rest, int64_t width, T* __restrict to) {
    for (int64_t d = 0; d < width; ++d) to[d] = row[d] + rest[d];
}
DCDIT_CLONES void add(const float* row, const float* rest, int64_t width, BFloat16* to) {
    add_into(row, rest, width, to);
}
DCDIT_CLONES void add(const float* row, const float* rest, int64_t width, float* to) { add_into(row, rest, width, to); }
DCDIT_CLONES void add(const double* row, const double* rest, int64_t width, double* to) {
    add_into(row, rest, width, to);
}

constexpr int64_t kRun = 128;

}  // namespace

template <class Real>
void window_sum(const WindowArgs& a, const Real* x, const Real* weight, Real* out, Real* total, int threads) {
    const int plane = a.height * a.width, radius = a.radius;
    std::vector<Real> falloff(radius + 1);
    for (int d = 0; d <= radius; ++d) falloff[d] = Real(std::exp(-double(d) * d / (2 * a.sigma * a.sigma)));
    share_runs(a.rows, kRun, threads, [&](int64_t first, int64_t last) {
        std::vector<const Real*> near;
        std::vector<Real> near_weight;
        for (int64_t r = first; r < last; ++r) {
            const int b = a.sample[r];
            const int *begin = a.token + a.cu[b], *end = a.token + a.cu[b + 1];
            const int cell0 = b * plane * a.frames, cell = a.token[r] - cell0;
            const int f = cell / plane, y = cell / a.width % a.height, column = cell % a.width;
            near.clear();
            near_weight.clear();
            Real sum = 0;
            for (int nf = std::max(f - radius, 0); nf <= std::min(f + radius, a.frames - 1); ++nf)
                for (int ny = std::max(y - radius, 0); ny <= std::min(y + radius, a.height - 1); ++ny) {
                    const int line = cell0 + nf * plane + ny * a.width;
                    const int stop = line + std::min(column + radius, a.width - 1);
                    const Real across = falloff[std::abs(nf - f)] * falloff[std::abs(ny - y)];
                    const int* token = std::lower_bound(begin, end, line + std::max(column - radius, 0));
                    for (; token < end && *token <= stop; ++token) {
                        const int64_t j = token - a.token;
                        if (j == r) continue;
                        const Real w = across * falloff[std::abs(*token - line - column)] * weight[j];
                        sum += w;
                        near.push_back(x + j * a.features);
                        near_weight.push_back(w);
                    }
                    begin = token;
                }
            total[r] = sum;
            mix_rows(near.data(), near_weight.data(), int(near.size()), a.features, out + r * a.features);
        }
    });
}

template <class T, class Real>
void plug(const PlugArgs& a, const Real* rows, const Real* residual, T* out, int threads) {
    share_runs(a.cells, kRun, threads, [&](int64_t first, int64_t last) {
        for (int64_t c = first; c < last; ++c) {
            T* to = out + c * a.features;
            const Real* row = a.nearest[c] < 0 ? nullptr : rows + a.nearest[c] * a.features;
            const Real* rest = residual ? residual + c * a.features : nullptr;
            if (row && rest)
                add(row, rest, a.features, to);
            else if (row || rest)
                std::copy(row ? row : rest, (row ? row : rest) + a.features, to);
            else
                std::fill(to, to + a.features, T(0));
        }
    });
}

template <class Real>
void plug_backward(const PlugArgs& a, const Real* grad, const Real* rows, Real* grad_rows, Real* through, int threads) {
    share_runs(a.rows, kRun, threads, [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r) {
            Real* sum = grad_rows + r * a.features;
            std::fill(sum, sum + a.features, Real(0));
            for (int m = a.offsets[r]; m < a.offsets[r + 1]; ++m)
                through[a.member[m]] = take(grad + a.member[m] * a.features, rows + r * a.features, a.features, sum);
        }
    });
}

template void window_sum(const WindowArgs&, const float*, const float*, float*, float*, int);
template void window_sum(const WindowArgs&, const double*, const double*, double*, double*, int);
template void plug(const PlugArgs&, const float*, const float*, BFloat16*, int);
template void plug(const PlugArgs&, const float*, const float*, float*, int);
template void plug(const PlugArgs&, const double*, const double*, double*, int);
template void plug_backward(const PlugArgs&, const float*, const float*, float*, float*, int);
template void plug_backward(const PlugArgs&, const double*, const double*, double*, double*, int);

}  // namespace dcdit
