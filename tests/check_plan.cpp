// Plans and row copies of csrc by two executors, equal bit by bit: the CPU's block of one thread against CUDA, or, built
// without CUDA, against the CPU's block of 64 and against a block of real threads that meet only at its barriers.
//
//   check_plan        checks; every output is poisoned before it is written
//   check_plan raw    checks without the poison, for initcheck: what is read must have been written
//   check_plan time   prints microseconds of each launch instead (CUDA only)
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "fill.h"
#include "launch.h"
#include "thread_block.h"
#ifdef DCDIT_CUDA
#include <cuda_runtime.h>
#endif

using namespace dcdit;

constexpr int kPoison = 0x5a5a5a5a;
bool poison = true;

struct Problem {
    std::array<int, 3> dim;
    int axes, batch, mode;
    int64_t capacity;  // -1: as many rows as are retained
    float drop;
    std::vector<float> prob;
    int max_seqlen = INT_MAX;
    bool masked = false;  // a part of the cells kept, another banned
    int64_t rows = -1, budget = -1;
    int64_t cells() const { return int64_t(dim[0]) * dim[1] * dim[2]; }
    // Of five cells two are kept (1) and one is banned (2).
    std::vector<uint8_t> mask(int kind) const {
        std::vector<uint8_t> out(prob.size());
        for (size_t i = 0; i < out.size(); ++i) out[i] = (i % 5 == 1 || i % 5 == 2 ? 1 : i % 5 == 3 ? 2 : 0) == kind;
        return out;
    }
};

// One array in the memory of its executor, an allocation of its own, so that a tool sees where it ends.
template <class T>
struct HostArray {
    std::vector<T> values;
    explicit HostArray(size_t size) : values(size, T(kPoison)) {}
    explicit HostArray(std::vector<T> from) : values(std::move(from)) {}
    T* data() { return values.data(); }
    std::vector<T> get() const { return values; }
};

#ifdef DCDIT_CUDA
void check(cudaError_t error) {
    if (error == cudaSuccess) return;
    std::printf("CUDA: %s\n", cudaGetErrorString(error));
    std::exit(2);
}
void check(const char* error) {
    if (!error) return;
    std::printf("CUDA: %s\n", error);
    std::exit(2);
}

template <class T>
struct CudaArray {
    size_t size;
    T* pointer = nullptr;
    explicit CudaArray(size_t n) : size(n) {
        check(cudaMalloc(&pointer, std::max<size_t>(n, 1) * sizeof(T)));
        if (poison) check(cudaMemset(pointer, kPoison & 255, n * sizeof(T)));
    }
    explicit CudaArray(const std::vector<T>& from) : CudaArray(from.size()) {
        check(cudaMemcpy(pointer, from.data(), size * sizeof(T), cudaMemcpyHostToDevice));
    }
    CudaArray(const CudaArray&) = delete;
    ~CudaArray() { cudaFree(pointer); }
    T* data() { return pointer; }
    std::vector<T> get() const {
        std::vector<T> out(size);
        check(cudaMemcpy(out.data(), pointer, size * sizeof(T), cudaMemcpyDeviceToHost));
        return out;
    }
};

struct Cuda {
    static constexpr int block = 1024;
    template <class T> using Array = CudaArray<T>;
    static void count(const CountArgs& a) { check(plan_count_cuda(a, false, nullptr)); }
    static void fill(const FillArgs& a) { check(plan_fill_cuda(a, nullptr)); }
    static void rows(const RowArgs& a) { check(move_rows_cuda(a, nullptr)); }
};
#endif

template <int Block>
struct Cpu {
    static constexpr int block = Block;
    template <class T> using Array = HostArray<T>;
    static void count(const CountArgs& a) { plan_count_cpu(a, false, 1, Block); }
    static void fill(const FillArgs& a) { plan_fill_cpu(a, 1, Block); }
    static void rows(const RowArgs& a) { move_rows_cpu(a, 1); }
};

struct Threads : Cpu<64> {
    static void count(const CountArgs& a) {
        ThreadGrid grid;
        grid.each(a.batch, [&](auto& exec, auto& shared, int b) { count_sample<float>(exec, shared, a, b); });
        place_samples<float>(grid, a);
    }
    static void fill(const FillArgs& a) {
        ThreadGrid grid;
        grid.each(a.batch, [&](auto& exec, auto& shared, int b) { fill_sample(exec, shared, a, b, a.scratch); });
        grid.first([&](auto& exec, auto&) { fill_tail(exec, a, 0, 1); });
    }
};

// Everything that plan_chunks returns, in order.
using Plan = std::array<std::vector<int>, 8>;
constexpr const char* kNames[] = {"status", "cu_seqlens", "overflow", "token_index", "sample_index", "nearest",
                                  "member_offsets", "member_index"};

template <class Where>
struct Buffers {
    template <class T> using Array = typename Where::template Array<T>;
    Array<float> prob;
    Array<uint8_t> keep, ban;
    Array<int> prefix, sums, info, base, cu, overflow, status;
    CountArgs count;

    explicit Buffers(const Problem& p)
        : prob(p.prob), keep(p.mask(1)), ban(p.mask(2)), prefix(p.batch * p.cells()), sums(p.batch * p.cells() + kDigits),
          info(4 * p.batch), base(p.batch + 1), cu(p.batch + 1), overflow(1),
          status(2),
          count{prob.data(), p.masked ? keep.data() : nullptr, p.masked ? ban.data() : nullptr, nullptr, p.drop, nullptr,
                p.rows, p.budget, 0.5, p.batch, p.cells(), p.capacity, p.mode, prefix.data(), sums.data(), info.data(),
                base.data(), cu.data(), overflow.data(), status.data(), p.max_seqlen} {}
};

template <class Where>
struct Filled {
    template <class T> using Array = typename Where::template Array<T>;
    int64_t rows;
    Array<int> token, sample, nearest, offsets, member, scratch;
    FillArgs fill;

    Filled(const Problem& p, Buffers<Where>& b, int64_t capacity)
        : rows(capacity), token(rows), sample(rows), nearest(p.batch * p.cells()), offsets(rows + 1),
          member(p.batch * p.cells()), scratch(p.batch * scratch_ints(p.cells(), p.axes, Where::block)),
          fill{{p.dim[0], p.dim[1], p.dim[2]}, p.axes, p.batch, p.cells(), rows, p.mode, b.prefix.data(), b.base.data(),
               b.cu.data(), token.data(), sample.data(), nearest.data(), offsets.data(), member.data(), scratch.data()} {}
};

template <class Where>
Plan plan(const Problem& p) {
    Buffers<Where> b(p);
    Where::count(b.count);
    const std::vector<int> status = b.status.get();
    Filled<Where> f(p, b, p.capacity < 0 ? std::max(status[0], 0) : p.capacity);
    Where::fill(f.fill);
    return {status, b.cu.get(), b.overflow.get(), f.token.get(), f.sample.get(), f.nearest.get(), f.offsets.get(), f.member.get()};
}

// Scattered probabilities, few of them distinct so that the drop meets ties; the second sample keeps nothing.
std::vector<float> draw(std::mt19937& random, int batch, int64_t cells, float share) {
    std::vector<float> prob(batch * cells);
    for (int64_t i = 0; i < int64_t(prob.size()); ++i) {
        const float level = (random() % 8) / 16.0f;  // below 1/2
        const bool kept = random() % 1000 < 1000 * share && i / cells != 1;
        prob[i] = kept ? 0.5625f + level / 2 : level;
    }
    return prob;
}

// Budgets of the batch: none, one, a few and all of the cells; few levels of probability, or one; samples without a
// candidate, NaN and infinity.
void add_budgets(std::vector<Problem>& out, std::mt19937& random, int side, int batch) {
    const int64_t cells = int64_t(side) * side, all = batch * cells;
    for (int64_t budget : {int64_t(0), int64_t(1), all / 3, all - 1, all, all + 1})
        for (int kind = 0; kind < 3; ++kind) {
            Problem p{{side, side, 1}, 2, batch, kind == 1 ? kPrevious : kGrid, budget, 0, draw(random, batch, cells, 0.3f)};
            p.budget = budget;
            p.masked = kind == 1;
            if (kind == 1) std::fill(p.prob.begin(), p.prob.end(), 0.25f);
            if (kind == 2) p.max_seqlen = int(cells / 2), p.prob[all / 2] = NAN, p.prob[all - 1] = INFINITY;
            out.push_back(p);
        }
}

std::vector<Problem> problems() {
#ifdef DCDIT_CUDA
    const std::array<int, 3> grids[] = {{32, 32, 1}, {7, 9, 1}, {1, 13, 1}, {64, 64, 1}, {5, 1, 1}, {2, 3, 4}, {16, 5, 1}, {4, 16, 16}};
#else  // blocks of 4 and 64 threads have several cells each here, and ThreadSanitizer is slow
    const std::array<int, 3> grids[] = {{16, 16, 1}, {7, 9, 1}, {1, 13, 1}, {20, 25, 1}, {5, 1, 1}, {2, 3, 4}, {16, 5, 1}, {4, 8, 8}};
#endif
    std::mt19937 random(0);
    std::vector<Problem> out;
    for (auto dim : grids)
        for (int mode : {kGrid, kLine, kPrevious})
            for (int kind = 0; kind < 5; ++kind) {
                Problem p{dim, dim[2] > 1 ? 3 : 2, 3 + int(random() % 2), mode, -1, kind == 1 ? 0.0f : 0.4f, {}, INT_MAX};
                const int64_t all = p.batch * p.cells();
                if (kind == 1 || kind == 2) p.capacity = kind == 1 ? all + 5 : all / 4;  // spare rows; too few for some
                if (kind == 3) p.capacity = p.budget = all * 2 / 5;  // the most probable of the batch
                if (kind == 4) p.rows = p.cells() / 2;  // of each sample
                if (kind == 2) p.max_seqlen = int(p.cells() / 5);  // the longest samples lose their least probable
                p.prob = draw(random, p.batch, p.cells(), kind == 0 ? 1.0f : 0.3f);
                p.masked = kind == 2 || mode == kLine;
                out.push_back(p);
            }
    Problem none{{7, 9, 1}, 2, 2, kGrid, -1, 0, std::vector<float>(126, 0.25f)};
    Problem one = none, broken = none;
    one.prob[40] = 0.75f, one.prob[126 - 1] = 0.75f;
    broken.prob[3] = NAN, broken.capacity = 10;
    out.insert(out.end(), {none, one, broken});
    for (int batch : {1, 5}) add_budgets(out, random, 8, batch);
#ifdef DCDIT_CUDA
    for (int side : {32, 64}) add_budgets(out, random, side, 64);
#endif
    return out;
}

template <class Where>
int check_plans() {
    int wrong = 0;
    for (const Problem& p : problems()) {
        const Plan want = plan<Cpu<1>>(p), got = plan<Where>(p);
        for (size_t i = 0; i < want.size(); ++i)
            if (got[i] != want[i]) {
                ++wrong;
                const auto at = std::mismatch(want[i].begin(), want[i].end(), got[i].begin());
                std::printf("grid %dx%dx%d batch %d mode %d capacity %ld drop %g: %s differs first at %ld\n", p.dim[0], p.dim[1],
                            p.dim[2], p.batch, p.mode, long(p.capacity), p.drop, kNames[i], long(at.first - want[i].begin()));
            }
    }
    return wrong;
}

// Rows of `bytes` bytes, gathered and scattered, in and out of a wider tensor; -1 stays zero, or goes nowhere.
template <class Where>
std::vector<char> moved(int64_t rows, int64_t bytes, int64_t pitch, bool scatter) {
    std::vector<char> x(rows * pitch);
    for (size_t i = 0; i < x.size(); ++i) x[i] = char(i * 7 + i / 251);
    std::vector<int64_t> index(rows);
    for (int64_t i = 0; i < rows; ++i) index[i] = i % 3 ? rows - 1 - i : -1;
    typename Where::template Array<char> from(x), out(std::vector<char>(rows * bytes));
    typename Where::template Array<int64_t> places(index);
    Where::rows({from.data(), pitch, places.data(), out.data(), bytes, rows, bytes, rows, scatter});
    return out.get();
}

template <class Where>
int check_rows() {
    int wrong = 0;
    for (int64_t bytes : {1, 10, 48, 256, 2304})
        for (int64_t wider : {0, 4, 16})
            for (bool scatter : {false, true})
                if (moved<Cpu<1>>(37, bytes, bytes + wider, scatter) != moved<Where>(37, bytes, bytes + wider, scatter)) {
                    ++wrong;
                    std::printf("%s rows of %ld bytes, pitch %ld: differ\n", scatter ? "scattered" : "gathered", long(bytes), long(bytes + wider));
                }
    return wrong;
}

#ifdef DCDIT_CUDA
template <class F>
double microseconds(F launch) {
    cudaEvent_t begin, end;
    check(cudaEventCreate(&begin)), check(cudaEventCreate(&end));
    for (int i = 0; i < 5; ++i) launch();
    const int times = 50;
    check(cudaEventRecord(begin));
    for (int i = 0; i < times; ++i) launch();
    check(cudaEventRecord(end)), check(cudaEventSynchronize(end));
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin, end));
    return 1e3 * milliseconds / times;
}

void time_plans() {
    std::mt19937 random(0);
    for (int side : {32, 64})
        for (int batch : {1, 16, 64})
            for (float share : {0.25f, 0.02f})
                for (bool budget : {false, true}) {
                    const int64_t all = int64_t(batch) * side * side;
                    Problem p{{side, side, 1}, 2, batch, kGrid, all, 0.5f, draw(random, batch, side * side, share)};
                    if (budget) p.capacity = p.budget = int64_t(all * share);
                    Buffers<Cuda> b(p);
                    Filled<Cuda> f(p, b, p.capacity);
                    const double count = microseconds([&] { Cuda::count(b.count); });
                    const double fill = microseconds([&] { Cuda::fill(f.fill); });
                    std::printf("plan %dx%d B=%d keep %g%s: count and place %.1f us, fill %.1f us\n", side, side, batch, share,
                                budget ? " of the batch" : "", count, fill);
                }
}
#endif

int main(int count, char** words) {
    const std::string what = count > 1 ? words[1] : "";
    poison = what != "raw";
#ifdef DCDIT_CUDA
    if (what == "time") return time_plans(), 0;
    const int wrong = check_plans<Cuda>() + check_rows<Cuda>();
    check(cudaDeviceSynchronize());
#else
    pthread_barrier_init(&meeting, nullptr, kThreads);
    const int wrong = check_plans<Cpu<64>>() + check_rows<Cpu<64>>() + check_plans<Threads>();
#endif
    if (wrong) std::printf("%d differ\n", wrong);
    else std::printf("clean: %zu plans\n", problems().size());
    return wrong != 0;
}
