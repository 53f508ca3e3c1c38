// The chunk on the CPU: each row is read and written once.
#include "chunk.h"

#include "host.h"

namespace dcdit {
namespace {

// to = x + y, where y may be null.
template <class From, class T, class Real = Wide<T>>
DCDIT_INLINE void put(const From* x, const T* y, int64_t width, T* __restrict to) {
    if (!y) return void(std::copy(x, x + width, to));
    for (int64_t d = 0; d < width; ++d) to[d] = Real(x[d]) + Real(y[d]);
}
DCDIT_CLONES void put_row(const BFloat16* x, const BFloat16* y, int64_t width, BFloat16* to) { put(x, y, width, to); }
DCDIT_CLONES void put_row(const float* x, const float* y, int64_t width, float* to) { put(x, y, width, to); }
DCDIT_CLONES void put_row(const double* x, const double* y, int64_t width, double* to) { put(x, y, width, to); }

// The mean of `count` rows of h, summed in `wide`, + y.
template <class T, class Real>
DCDIT_INLINE void mean(const T* h, const int* member, int count, const T* y, int64_t width, Real* __restrict wide, T* to) {
    std::fill(wide, wide + width, Real(0));
    for (int m = 0; m < count; ++m) {
        const T* row = h + member[m] * width;
        for (int64_t d = 0; d < width; ++d) wide[d] += Real(row[d]);
    }
    for (int64_t d = 0; d < width; ++d) wide[d] /= Real(count);
    put(wide, y, width, to);
}
DCDIT_CLONES void mean_row(const BFloat16* h, const int* member, int count, const BFloat16* y, int64_t width,
                           float* wide, BFloat16* to) {
    mean(h, member, count, y, width, wide, to);
}
DCDIT_CLONES void mean_row(const float* h, const int* member, int count, const float* y, int64_t width, float* wide,
                           float* to) {
    mean(h, member, count, y, width, wide, to);
}
DCDIT_CLONES void mean_row(const double* h, const int* member, int count, const double* y, int64_t width, double* wide,
                           double* to) {
    mean(h, member, count, y, width, wide, to);
}

constexpr int64_t kRun = 64;

}  // namespace

template <class T>
void chunk(const ChunkArgs& a, const T* h, const T* pos, T* out, int threads) {
    share_runs(a.rows, kRun, threads, [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r) {
            T* to = out + r * a.features;
            const int64_t token = a.token[r];
            if (token < 0)
                std::fill(to, to + a.features, T(0));
            else
                put_row(h + token * a.features, offset(pos, token % a.cells * a.features), a.features, to);
        }
    });
}

template <class T>
void chunk_mean(const ChunkArgs& a, const T* h, const T* pos, T* out, int threads) {
    share_runs(a.rows, kRun, threads, [&](int64_t first, int64_t last) {
        std::vector<Wide<T>> wide(a.features);
        for (int64_t r = first; r < last; ++r) {
            T* to = out + r * a.features;
            const int64_t token = a.token[r], at = a.offsets[r];
            if (token < 0)
                std::fill(to, to + a.features, T(0));
            else
                mean_row(h, a.member + at, int(a.offsets[r + 1] - at), offset(pos, token % a.cells * a.features),
                         a.features, wide.data(), to);
        }
    });
}

#define DCDIT_INSTANCES(T)                                                \
    template void chunk(const ChunkArgs&, const T*, const T*, T*, int);   \
    template void chunk_mean(const ChunkArgs&, const T*, const T*, T*, int);
DCDIT_INSTANCES(BFloat16)
DCDIT_INSTANCES(float)
DCDIT_INSTANCES(double)

}  // namespace dcdit
