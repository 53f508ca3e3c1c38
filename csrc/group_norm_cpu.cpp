// A piece of work is whole groups of one sample, 192 channels or a few more: its cells stay in the second-level cache between the
// pass for the statistics and the pass that writes. Sums are of 256 cells in Real, and of those sums in double, in an
// order that neither the batch nor the threads change.
#include "group_norm.h"

#include <cmath>

#include "host.h"

namespace dcdit {
namespace {

constexpr int64_t kChannels = 192, kRun = 256;

DCDIT_INLINE double exp_of(double z) { return std::exp(z); }

// 2^n·e^r with |r| ≤ log(2)/2, a polynomial of degree six, within 2 units of the last place. |z| is held to 87, by its
// bits: no comparison of floats that might trap is vectorised.
DCDIT_INLINE float exp_of(float z) {
    const uint32_t bits = bits_as<uint32_t>(z), size = bits & 0x7FFFFFFF, most = 0x42AE0000;  // 87
    z = bits_as<float>((size < most ? size : most) | (bits & 0x80000000));
    const float magic = 12582912.0f;  // 1.5·2^23: what is added to it is rounded to an integer
    const float shifted = z * 1.44269504f + magic, n = shifted - magic;
    const float r = (z - n * 0.693359375f) + n * 2.12194440e-4f;
    const float p = ((((1.3981999507e-3f * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r + 1.6666665459e-1f) * r +
                     5.0000001201e-1f) * r * r + r + 1.0f;
    return p * bits_as<float>((bits_as<int32_t>(shifted) - bits_as<int32_t>(magic) + 127) << 23);
}

template <class Real>
DCDIT_INLINE Real sigmoid(Real z) {
    return Real(1) / (Real(1) + exp_of(-z));
}

// One piece: `width` channels, a cell's to the next cell's `pitch` apart.
template <class T, class Real = Wide<T>>
struct Piece {
    const T *x, *grad;
    T *out;  // forward: the result; backward: ∂x
    const Real *shift, *centre, *factor, *bias, *rstd, *level, *along;  // by channel
    Real *first, *second;                                              // sums of a run, by channel
    int64_t cells, width, pitch;
};

// Σ (x − shift) and Σ (x − shift)².
template <class T, class Real>
DCDIT_INLINE void add_moments(const Piece<T, Real>& p) {
    Real *first = p.first, *second = p.second;
    const T* x = p.x;
    const Real* shift = p.shift;
    for (int64_t i = 0; i < p.cells; ++i, x += p.pitch)
#pragma GCC ivdep
        for (int64_t c = 0; c < p.width; ++c) {
            const Real d = x[c] - shift[c];
            first[c] += d;
            second[c] += d * d;
        }
}

template <class T, class Real>
DCDIT_INLINE void write(const Piece<T, Real>& p) {
    T* out = p.out;
    const T* x = p.x;
    const Real *centre = p.centre, *factor = p.factor, *bias = p.bias;
    for (int64_t i = 0; i < p.cells; ++i, x += p.pitch, out += p.pitch)
#pragma GCC ivdep
        for (int64_t c = 0; c < p.width; ++c) {
            const Real z = (x[c] - centre[c]) * factor[c] + bias[c];
            out[c] = z * sigmoid(z);
        }
}

// ∂z in place of the result, Σ ∂z and Σ ∂z·x̂.
template <class Real>
DCDIT_INLINE void through_silu(const Piece<Real>& p) {
    Real *out = p.out, *first = p.first, *second = p.second;
    const Real *x = p.x, *grad = p.grad, *rstd = p.rstd;
    const Real *centre = p.centre, *factor = p.factor, *bias = p.bias;
    for (int64_t i = 0; i < p.cells; ++i, x += p.pitch, grad += p.pitch, out += p.pitch)
#pragma GCC ivdep
        for (int64_t c = 0; c < p.width; ++c) {
            const Real d = x[c] - centre[c], z = d * factor[c] + bias[c], s = sigmoid(z);
            const Real g = grad[c] * s * (Real(1) + z * (Real(1) - s));
            out[c] = g;
            first[c] += g;
            second[c] += g * (d * rstd[c]);
        }
}

// ∂x from ∂z: rstd·(weight·∂z − level − x̂·along), where level and along have rstd in them.
template <class Real>
DCDIT_INLINE void through_norm(const Piece<Real>& p) {
    Real* out = p.out;
    const Real *x = p.x, *centre = p.centre, *rstd = p.rstd;
    const Real *factor = p.factor, *level = p.level, *along = p.along;
    for (int64_t i = 0; i < p.cells; ++i, x += p.pitch, out += p.pitch)
#pragma GCC ivdep
        for (int64_t c = 0; c < p.width; ++c)
            out[c] = out[c] * factor[c] - level[c] - (x[c] - centre[c]) * rstd[c] * along[c];
}

enum Pass { kMoments, kWrite, kThroughSilu, kThroughNorm };
template <class T>
DCDIT_INLINE void run_pass(Pass pass, const Piece<T>& p) {
    if (pass == kMoments) return add_moments(p);
    if (pass == kWrite) return write(p);
    if constexpr (std::is_same_v<T, Wide<T>>) return pass == kThroughSilu ? through_silu(p) : through_norm(p);
}
DCDIT_CLONES void run(Pass pass, const Piece<BFloat16>& p) { run_pass(pass, p); }
DCDIT_CLONES void run(Pass pass, const Piece<float>& p) { run_pass(pass, p); }
DCDIT_CLONES void run(Pass pass, const Piece<double>& p) { run_pass(pass, p); }

// The numbers of one piece's channels, and the passes over its cells.
template <class T>
class Work {
    using Real = Wide<T>;

   public:
    Work(const GroupNormArgs& a, int64_t sample, int64_t first_channel, int64_t width)
        : a_(a), width_(width), start_(sample * a.cells * a.channels + first_channel), reals_(9 * width), sums_(2 * width) {}

    // Statistics of the groups, and with them what every pass needs by channel.
    void measure(const T* x, const Real* weight, const Real* bias, const Real* cond, const Real* x_bias) {
        x_ = x + start_;
        std::copy(x_, x_ + width_, row(kShift));
        sweep(kMoments);
        const double cells = double(a_.cells);
        const int64_t size = a_.channels / a_.groups;
        for (int64_t c = 0; c < width_; ++c) {  // first: the mean of x + added, second: Σ of squares about it
            const double mean = sums_[c] / cells, added = (cond ? cond[c] : 0.0) + (x_bias ? x_bias[c] : 0.0);
            sums_[width_ + c] -= mean * sums_[c];
            added_.push_back(added);
            mean_.push_back(mean + row(kShift)[c] + added);
        }
        for (int64_t g = 0; g < width_; g += size) {
            double mean = 0, spread = 0;
            for (int64_t c = g; c < g + size; ++c) mean += mean_[c] / double(size);
            for (int64_t c = g; c < g + size; ++c)
                spread += sums_[width_ + c] + cells * (mean_[c] - mean) * (mean_[c] - mean);
            const double rstd = 1 / std::sqrt(std::max(spread, 0.0) / (cells * double(size)) + a_.eps);
            for (int64_t c = g; c < g + size; ++c) {
                row(kCentre)[c] = Real(mean - added_[c]);
                row(kRstd)[c] = Real(rstd);
                row(kFactor)[c] = Real(rstd * weight[c]);
                row(kBias)[c] = bias[c];
                mean_[c] = (mean_[c] - mean) * rstd;  // from here on the mean of x̂
            }
        }
    }

    void forward(T* out) {
        out_ = out + start_;
        sweep(kWrite);
    }

    void backward(const Real* grad, const Real* weight, Real* grad_x, Real* grad_weight, Real* grad_bias, Real* grad_cond) {
        grad_ = grad + start_, out_ = grad_x + start_;
        sweep(kThroughSilu);
        const double cells = double(a_.cells);
        const int64_t size = a_.channels / a_.groups;
        for (int64_t g = 0; g < width_; g += size) {
            double level = 0, along = 0;
            for (int64_t c = g; c < g + size; ++c) {
                level += weight[c] * sums_[c] / (cells * double(size));
                along += weight[c] * sums_[width_ + c] / (cells * double(size));
            }
            for (int64_t c = g; c < g + size; ++c) {
                const double rstd = row(kRstd)[c];
                row(kLevel)[c] = Real(rstd * level);
                row(kAlong)[c] = Real(rstd * along);
                grad_weight[c] = Real(sums_[width_ + c]);
                grad_bias[c] = Real(sums_[c]);
                grad_cond[c] = Real(rstd * (weight[c] * sums_[c] - cells * (level + mean_[c] * along)));
            }
        }
        sweep(kThroughNorm);
    }

   private:
    enum Row { kShift, kCentre, kFactor, kBias, kRstd, kLevel, kAlong, kFirst, kSecond };
    Real* row(Row which) { return reals_.data() + which * width_; }

    // A pass over all cells, run by run; the runs' sums add up in sums_.
    void sweep(Pass pass) {
        std::fill(sums_.begin(), sums_.end(), 0.0);
        for (int64_t i = 0; i < a_.cells; i += kRun) {
            std::fill(row(kFirst), row(kFirst) + 2 * width_, Real(0));
            const int64_t by = i * a_.channels;
            run(pass, Piece<T>{x_ + by, grad_ ? grad_ + by : nullptr, out_ ? out_ + by : nullptr, row(kShift),
                                  row(kCentre), row(kFactor), row(kBias), row(kRstd), row(kLevel), row(kAlong),
                                  row(kFirst), row(kSecond), std::min(kRun, a_.cells - i), width_, a_.channels});
            for (int64_t c = 0; c < 2 * width_; ++c) sums_[c] += row(kFirst)[c];
        }
    }

    const GroupNormArgs& a_;
    int64_t width_, start_;
    const T *x_ = nullptr, *grad_ = nullptr;
    T* out_ = nullptr;
    std::vector<Real> reals_;
    std::vector<double> sums_, mean_, added_;
};

// f(work, sample, first channel) for every piece.
template <class T, class F>
void share_pieces(const GroupNormArgs& a, int threads, F f) {
    const int64_t size = a.channels / a.groups, share = (kChannels + size - 1) / size * size;
    const int64_t pieces = (a.channels + share - 1) / share;
    share_items(a.batch * pieces, threads, [&](int64_t i, int) {
        const int64_t first = i % pieces * share;
        Work<T> work(a, i / pieces, first, std::min(share, a.channels - first));
        f(work, i / pieces, first);
    });
}

}  // namespace

template <class T, class Real>
void group_norm_silu(const GroupNormArgs& a, const T* x, const Real* weight, const Real* bias, const Real* cond,
                     const Real* x_bias, T* out, int threads) {
    share_pieces<T>(a, threads, [&](Work<T>& work, int64_t sample, int64_t c) {
        work.measure(x, weight + c, bias + c, offset(cond, sample * a.cond_pitch + c), offset(x_bias, c));
        work.forward(out);
    });
}

template <class Real>
void group_norm_silu_backward(const GroupNormArgs& a, const Real* grad, const Real* x, const Real* weight,
                              const Real* bias, const Real* cond, const Real* x_bias, Real* grad_x, Real* grad_rest,
                              int threads) {
    share_pieces<Real>(a, threads, [&](Work<Real>& work, int64_t sample, int64_t c) {
        work.measure(x, weight + c, bias + c, offset(cond, sample * a.cond_pitch + c), offset(x_bias, c));
        Real* rest = grad_rest + 3 * sample * a.channels + c;
        work.backward(grad, weight + c, grad_x, rest, rest + a.channels, rest + 2 * a.channels);
    });
}

#define DCDIT_FORWARD(T)                                                                                             \
    template void group_norm_silu(const GroupNormArgs&, const T*, const Wide<T>*, const Wide<T>*, const Wide<T>*,    \
                                  const Wide<T>*, T*, int);
#define DCDIT_INSTANCES(Real)                                                                                           \
    DCDIT_FORWARD(Real)                                                                                                 \
    template void group_norm_silu_backward(const GroupNormArgs&, const Real*, const Real*, const Real*, const Real*,    \
                                           const Real*, const Real*, Real*, Real*, int);
DCDIT_INSTANCES(float)
DCDIT_INSTANCES(double)
DCDIT_FORWARD(BFloat16)

}  // namespace dcdit
