// dcdit_kernels._C: addresses of tensors come in as integers, so that no torch header is needed.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "chunk.h"
#include "cosine.h"
#include "dechunk.h"
#include "fill.h"
#include "group_norm.h"
#include "host.h"
#include "launch.h"
#include "modulate.h"

namespace py = pybind11;
using namespace dcdit;

namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

#ifdef DCDIT_CUDA
void check(const char* op, const char* error) {
    if (error) throw std::runtime_error(std::string(op) + ": CUDA: " + error);
}
#endif

// Where a call runs: a stream's handle, or CPU threads and the size of their blocks.
struct Place {
    bool cuda;
    uintptr_t stream;
    int threads, block;
};

// Returns `status` on a CPU.
std::array<int, 2> plan_count(uintptr_t prob, uintptr_t keep, uintptr_t ban, bool is_double, uintptr_t fractions,
                              float fraction, uintptr_t rows, int64_t rows_all, int64_t budget, double threshold,
                              int batch, int64_t cells, int64_t capacity, int max_seqlen, int mode, uintptr_t prefix,
                              uintptr_t sums, uintptr_t info, uintptr_t member_base, uintptr_t cu_seqlens,
                              uintptr_t overflow, uintptr_t status, const Place& place) {
    CountArgs a{at<void>(prob), at<uint8_t>(keep),    at<uint8_t>(ban),    at<float>(fractions), fraction,
                at<int>(rows),  rows_all,             budget,              threshold,            batch,
                cells,          capacity,             mode,                at<int>(prefix),      at<int>(sums),
                at<int>(info),  at<int>(member_base), at<int>(cu_seqlens), at<int>(overflow),    at<int>(status),
                max_seqlen};
    py::gil_scoped_release release;
    if (!place.cuda) {
        plan_count_cpu(a, is_double, place.threads, place.block);
        return {a.status[0], a.status[1]};
    }
#ifdef DCDIT_CUDA
    check("plan_chunks", plan_count_cuda(a, is_double, at<void>(place.stream)));
#endif
    return {};
}

void plan_fill(std::array<int, 3> dim, int axes, int batch, int64_t cells, int64_t capacity, int mode, uintptr_t prefix,
               uintptr_t member_base, uintptr_t cu_seqlens, uintptr_t token_index, uintptr_t sample_index,
               uintptr_t nearest, uintptr_t member_offsets, uintptr_t member_index, uintptr_t scratch,
               const Place& place) {
    FillArgs a{{dim[0], dim[1], dim[2]}, axes,
               batch,                    cells,
               capacity,                 mode,
               at<int>(prefix),          at<int>(member_base),
               at<int>(cu_seqlens),      at<int>(token_index),
               at<int>(sample_index),    at<int>(nearest),
               at<int>(member_offsets),  at<int>(member_index),
               at<int>(scratch)};
    py::gil_scoped_release release;
    if (!place.cuda) return plan_fill_cpu(a, place.threads, place.block);
#ifdef DCDIT_CUDA
    check("plan_chunks", plan_fill_cuda(a, at<void>(place.stream)));
#endif
}

void move_rows([[maybe_unused]] const char* op, uintptr_t x, int64_t x_pitch, uintptr_t index, uintptr_t out, int64_t out_pitch,
               int64_t rows, int64_t bytes, int64_t limit, bool scatter, const Place& place) {
    RowArgs a{at<char>(x), x_pitch, at<int64_t>(index), at<char>(out), out_pitch, rows, bytes, limit, scatter};
    py::gil_scoped_release release;
    if (!place.cuda) return move_rows_cpu(a, place.threads);
#ifdef DCDIT_CUDA
    check(op, move_rows_cuda(a, at<void>(place.stream)));
#endif
}

template <class T>
void chunk_typed(bool mean, uintptr_t token, uintptr_t offsets, uintptr_t member, int64_t rows, int64_t cells,
                 int64_t features, uintptr_t h, uintptr_t pos, uintptr_t out, int threads) {
    ChunkArgs a{at<int>(token), at<int>(offsets), at<int>(member), rows, cells, features};
    py::gil_scoped_release release;
    (mean ? chunk_mean<T> : chunk<T>)(a, at<const T>(h), at<const T>(pos), at<T>(out), threads);
}

template <class Real>
void cosine_typed(const std::array<int64_t, 4>& sizes, uintptr_t q, uintptr_t k, uintptr_t weight, uintptr_t out,
                  int threads) {
    py::gil_scoped_release release;
    boundary_cosine({sizes[0], sizes[1], sizes[2], sizes[3]}, at<const Real>(q), at<const Real>(k),
                    at<const Real>(weight), at<Real>(out), threads);
}

template <class Real>
void window_sum_typed(uintptr_t token, uintptr_t sample, uintptr_t cu, int64_t rows, int64_t features,
                      std::array<int, 3> dim, int radius, double sigma, uintptr_t x, uintptr_t weight, uintptr_t out,
                      uintptr_t total, int threads) {
    WindowArgs a{at<int>(token), at<int>(sample), at<int>(cu), rows, features, dim[0], dim[1], dim[2], radius, sigma};
    py::gil_scoped_release release;
    window_sum(a, at<const Real>(x), at<const Real>(weight), at<Real>(out), at<Real>(total), threads);
}

template <class T>
void plug_typed(uintptr_t nearest, int64_t cells, int64_t features, uintptr_t rows, uintptr_t residual, uintptr_t out,
                int threads) {
    using Real = Wide<T>;
    PlugArgs a{at<int>(nearest), nullptr, nullptr, cells, 0, features};
    py::gil_scoped_release release;
    plug(a, at<const Real>(rows), at<const Real>(residual), at<T>(out), threads);
}

template <class Real>
void plug_backward_typed(uintptr_t offsets, uintptr_t member, int64_t rows, int64_t features, uintptr_t grad,
                         uintptr_t values, uintptr_t grad_rows, uintptr_t through, int threads) {
    PlugArgs a{nullptr, at<int>(offsets), at<int>(member), 0, rows, features};
    py::gil_scoped_release release;
    plug_backward(a, at<const Real>(grad), at<const Real>(values), at<Real>(grad_rows), at<Real>(through), threads);
}

// (gate, shift, scale) and their gradients: an address and the elements from one sample's row to the next's.
using Modulators = std::array<std::pair<uintptr_t, int64_t>, 3>;

ModulateArgs modulate_args(uintptr_t cu, int batch, int64_t features, const Modulators& m, double eps, bool centred) {
    return {at<int>(cu), batch, features, m[0].second, m[1].second, m[2].second, eps, centred};
}

template <class T>
void modulate_typed(uintptr_t cu, int batch, int64_t features, double eps, bool centred, uintptr_t x, uintptr_t y,
                    const Modulators& m, uintptr_t weight, uintptr_t sum, uintptr_t out, int threads) {
    using Real = Wide<T>;
    py::gil_scoped_release release;
    modulate(modulate_args(cu, batch, features, m, eps, centred), at<const T>(x), at<const T>(y),
             at<const Real>(m[0].first), at<const Real>(m[1].first), at<const Real>(m[2].first), at<const Real>(weight),
             at<T>(sum), at<T>(out), threads);
}

template <class Real>
void modulate_backward_typed(uintptr_t cu, int batch, int64_t features, double eps, bool centred, uintptr_t sum,
                             uintptr_t y, const Modulators& m, uintptr_t weight, uintptr_t grad_sum, uintptr_t grad_out,
                             uintptr_t grad_x, uintptr_t grad_y, std::array<uintptr_t, 3> grads, int threads) {
    py::gil_scoped_release release;
    modulate_backward(modulate_args(cu, batch, features, m, eps, centred), at<const Real>(sum), at<const Real>(y),
                      at<const Real>(m[0].first), at<const Real>(m[2].first), at<const Real>(weight),
                      at<const Real>(grad_sum), at<const Real>(grad_out), at<Real>(grad_x), at<Real>(grad_y),
                      at<Real>(grads[0]), at<Real>(grads[1]), at<Real>(grads[2]), threads);
}

// Addresses of x, weight, bias, cond, x_bias and out.
template <class T>
void group_norm_typed(int64_t batch, int64_t cells, int64_t channels, int64_t groups, int64_t cond_pitch, double eps,
                      const std::array<uintptr_t, 6>& t, int threads) {
    using Real = Wide<T>;
    py::gil_scoped_release release;
    group_norm_silu({batch, cells, channels, groups, cond_pitch, eps}, at<const T>(t[0]), at<const Real>(t[1]),
                    at<const Real>(t[2]), at<const Real>(t[3]), at<const Real>(t[4]), at<T>(t[5]), threads);
}

// Addresses of ∂out, x, weight, bias, cond, x_bias, ∂x and the gradients by sample.
template <class Real>
void group_norm_backward_typed(int64_t batch, int64_t cells, int64_t channels, int64_t groups, int64_t cond_pitch,
                               double eps, const std::array<uintptr_t, 8>& t, int threads) {
    py::gil_scoped_release release;
    group_norm_silu_backward({batch, cells, channels, groups, cond_pitch, eps}, at<const Real>(t[0]),
                             at<const Real>(t[1]), at<const Real>(t[2]), at<const Real>(t[3]), at<const Real>(t[4]),
                             at<const Real>(t[5]), at<Real>(t[6]), at<Real>(t[7]), threads);
}

// The CPU loops of one type, such as m.plug_float; of bfloat16 those of a forward that moves features.
template <class T>
void define_typed(py::module_& m, const std::string& type) {
    m.def(("chunk_" + type).c_str(), chunk_typed<T>);
    m.def(("plug_" + type).c_str(), plug_typed<T>);
    m.def(("modulate_" + type).c_str(), modulate_typed<T>);
    m.def(("group_norm_silu_" + type).c_str(), group_norm_typed<T>);
    if constexpr (std::is_same_v<T, Wide<T>>) {
        m.def(("boundary_cosine_" + type).c_str(), cosine_typed<T>);
        m.def(("window_sum_" + type).c_str(), window_sum_typed<T>);
        m.def(("plug_backward_" + type).c_str(), plug_backward_typed<T>);
        m.def(("modulate_backward_" + type).c_str(), modulate_backward_typed<T>);
        m.def(("group_norm_silu_backward_" + type).c_str(), group_norm_backward_typed<T>);
    }
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    define_typed<float>(m, "float");
    define_typed<double>(m, "double");
    define_typed<BFloat16>(m, "bfloat16");
    py::class_<Place>(m, "Place").def(py::init<bool, uintptr_t, int, int>()).def_readonly("threads", &Place::threads);
    m.def("plan_count", plan_count);
    m.def("plan_fill", plan_fill);
    m.def("move_rows", move_rows);
    m.def("scratch_ints", scratch_ints);
    m.attr("interface") = 6;  // number of the functions' arguments; extension.py compares it
    m.attr("digits") = kDigits;
    m.attr("cuda_archs") = DCDIT_CUDA_ARCHS;  // such as "80,90,100"; empty without CUDA
#ifdef DCDIT_CUDA
    m.def("cuda_versions", cuda_versions);
#endif
}
