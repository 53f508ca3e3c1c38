// Varlen adaLN on the CPU: a row is read once, and its statistics and result stay in the first-level cache.
#include "modulate.h"

#include <cmath>

#include "host.h"

namespace dcdit {
namespace {

template <class Real>
struct Moments {
    Real mean, rstd;
};
template <class Real>
DCDIT_INLINE Moments<Real> moments(const Real* x, int64_t width, double eps, bool centred) {
    const Real mean = centred ? lane_sum<Real>(width, [&](int64_t d) { return x[d]; }) / Real(width) : Real(0);
    const Real square = lane_sum<Real>(width, [&](int64_t d) { return (x[d] - mean) * (x[d] - mean); });
    return {mean, Real(1) / std::sqrt(square / Real(width) + Real(eps))};
}

template <class T, class Real = Wide<T>>
struct Row {
    const T *x, *y;
    const Real *gate, *shift, *factor;
    T *sum, *out;
    Real* wide;  // room for the row in Real, where T is another type
    int64_t width;
    double eps;
    bool centred;
};
// The row of sums in Real.
template <class Real>
DCDIT_INLINE const Real* add(const Row<Real>& r) {
    if (!r.y) return r.x;
    Real* __restrict sum = r.sum;
    for (int64_t d = 0; d < r.width; ++d) sum[d] = r.x[d] + r.gate[d] * r.y[d];
    return sum;
}
DCDIT_INLINE const float* add(const Row<BFloat16>& r) {
    float* __restrict wide = r.wide;
    if (r.y) {
        BFloat16* __restrict sum = r.sum;
        for (int64_t d = 0; d < r.width; ++d) sum[d] = wide[d] = r.x[d] + r.gate[d] * r.y[d];
    } else {
        std::copy(r.x, r.x + r.width, wide);
    }
    return wide;
}
template <class T, class Real>
DCDIT_INLINE void forward(const Row<T, Real>& r) {
    const Real* x = add(r);
    if (!r.out) return;
    const Moments<Real> m = moments(x, r.width, r.eps, r.centred);
    T* __restrict out = r.out;
    for (int64_t d = 0; d < r.width; ++d) out[d] = (x[d] - m.mean) * m.rstd * r.factor[d] + r.shift[d];
}
DCDIT_CLONES void forward_row(const Row<BFloat16>& r) { forward(r); }
DCDIT_CLONES void forward_row(const Row<float>& r) { forward(r); }
DCDIT_CLONES void forward_row(const Row<double>& r) { forward(r); }

template <class Real>
struct GradRow {
    const Real *sum, *y, *gate, *factor, *grad_sum, *grad_out;
    Real *grad_x, *grad_y;
    Real *gate_total, *shift_total, *normed_total;  // of the rows so far
    int64_t width;
    double eps;
    bool centred;
};
template <class Real>
DCDIT_INLINE void backward(const GradRow<Real>& r) {
    Real* __restrict grad_x = r.grad_x;
    if (r.grad_out) {
        const Moments<Real> m = moments(r.sum, r.width, r.eps, r.centred);
        const Real* g = r.grad_out;
        const auto normed = [&](int64_t d) { return (r.sum[d] - m.mean) * m.rstd; };
        const auto scaled = [&](int64_t d) { return g[d] * r.factor[d]; };
        const Real level = r.centred ? lane_sum<Real>(r.width, scaled) / Real(r.width) : Real(0);
        const Real along = lane_sum<Real>(r.width, [&](int64_t d) { return scaled(d) * normed(d); }) / Real(r.width);
        Real *__restrict shift_total = r.shift_total, *__restrict normed_total = r.normed_total;
        for (int64_t d = 0; d < r.width; ++d) {
            const Real z = normed(d);
            shift_total[d] += g[d];
            normed_total[d] += g[d] * z;
            grad_x[d] = m.rstd * (scaled(d) - level - z * along) + (r.grad_sum ? r.grad_sum[d] : Real(0));
        }
    } else {
        std::copy(r.grad_sum, r.grad_sum + r.width, grad_x);
    }
    if (!r.y) return;
    Real *__restrict grad_y = r.grad_y, *__restrict gate_total = r.gate_total;
    for (int64_t d = 0; d < r.width; ++d) {
        grad_y[d] = r.gate[d] * grad_x[d];
        gate_total[d] += grad_x[d] * r.y[d];
    }
}
DCDIT_CLONES void backward_row(const GradRow<float>& r) { backward(r); }
DCDIT_CLONES void backward_row(const GradRow<double>& r) { backward(r); }

// Rows of one sample that are summed together; fixed, so that sums do not depend on the number of threads.
constexpr int kRun = 64;
struct Run {
    int sample, first, last;
};
std::vector<Run> runs_of(const ModulateArgs& a) {
    std::vector<Run> runs;
    for (int b = 0; b < a.batch; ++b)
        for (int row = a.cu[b]; row < a.cu[b + 1]; row += kRun) runs.push_back({b, row, std::min(row + kRun, a.cu[b + 1])});
    return runs;
}

// The factor of each normalised number of a sample: weight·(1 + scale), made once for a run of its rows.
template <class Real>
class Factors {
   public:
    Factors(const Real* scale, const Real* weight, int64_t pitch, int64_t width, int threads)
        : scale_(scale), weight_(weight), pitch_(pitch), width_(width), rows_(scale ? threads * width : 0) {}
    const Real* of(int sample, int worker) {
        if (!scale_) return nullptr;
        Real* row = rows_.data() + worker * width_;
        const Real* scale = scale_ + sample * pitch_;
        for (int64_t d = 0; d < width_; ++d) row[d] = (Real(1) + scale[d]) * (weight_ ? weight_[d] : Real(1));
        return row;
    }

   private:
    const Real *scale_, *weight_;
    int64_t pitch_, width_;
    std::vector<Real> rows_;
};

}  // namespace

template <class T, class Real>
void modulate(const ModulateArgs& a, const T* x, const T* y, const Real* gate, const Real* shift, const Real* scale,
              const Real* weight, T* sum, T* out, int threads) {
    const std::vector<Run> runs = runs_of(a);
    Factors<Real> factors(scale, weight, a.scale_pitch, a.features, threads);
    std::vector<Real> wide(threads * a.features);
    share_items(runs.size(), threads, [&](int64_t i, int worker) {
        const Run run = runs[i];
        const Real* factor = factors.of(run.sample, worker);
        for (int64_t at = run.first * a.features; at < run.last * a.features; at += a.features)
            forward_row(Row<T>{x + at, offset(y, at), offset(gate, run.sample * a.gate_pitch),
                               offset(shift, run.sample * a.shift_pitch), factor, offset(sum, at), offset(out, at),
                               wide.data() + worker * a.features, a.features, a.eps, a.centred});
    });
}

template <class Real>
void modulate_backward(const ModulateArgs& a, const Real* sum, const Real* y, const Real* gate, const Real* scale,
                       const Real* weight, const Real* grad_sum, const Real* grad_out, Real* grad_x, Real* grad_y,
                       Real* grad_gate, Real* grad_shift, Real* grad_normed, int threads) {
    const std::vector<Run> runs = runs_of(a);
    const int64_t width = a.features;
    Factors<Real> factors(scale, weight, a.scale_pitch, width, threads);
    std::vector<Real> totals(3 * runs.size() * width);  // of each run: gate, shift, normed
    share_items(runs.size(), threads, [&](int64_t i, int worker) {
        const Run run = runs[i];
        const Real* factor = factors.of(run.sample, worker);
        Real* total = totals.data() + 3 * i * width;
        for (int64_t at = run.first * width; at < run.last * width; at += width)
            backward_row(GradRow<Real>{offset(sum, at), offset(y, at), offset(gate, run.sample * a.gate_pitch), factor,
                                       offset(grad_sum, at), offset(grad_out, at), grad_x + at, offset(grad_y, at),
                                       total, total + width, total + 2 * width, width, a.eps, a.centred});
    });
    Real* const grads[3] = {grad_gate, grad_shift, grad_normed};
    for (int part = 0; part < 3; ++part) {
        if (!grads[part]) continue;
        std::fill(grads[part], grads[part] + a.batch * width, Real(0));
        for (size_t i = 0; i < runs.size(); ++i)
            for (int64_t d = 0; d < width; ++d)
                grads[part][runs[i].sample * width + d] += totals[(3 * i + part) * width + d];
    }
}

#define DCDIT_FORWARD(T)                                                                                            \
    template void modulate(const ModulateArgs&, const T*, const T*, const Wide<T>*, const Wide<T>*, const Wide<T>*, \
                           const Wide<T>*, T*, T*, int);
#define DCDIT_INSTANCES(Real)                                                                                          \
    DCDIT_FORWARD(Real)                                                                                                \
    template void modulate_backward(const ModulateArgs&, const Real*, const Real*, const Real*, const Real*,           \
                                    const Real*, const Real*, const Real*, Real*, Real*, Real*, Real*, Real*, int);
DCDIT_INSTANCES(float)
DCDIT_INSTANCES(double)
DCDIT_FORWARD(BFloat16)

}  // namespace dcdit
