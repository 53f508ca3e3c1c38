// The CPU executor: a sample is one block, and samples are shared out among threads.
#include <cstring>

#include "fill.h"
#include "host.h"
#include "launch.h"

namespace dcdit {
namespace {

template <int Size>
struct HostBlock {
    static constexpr int size = Size, lanes = 1;

    // Threads of a phase run from the last to the first: a result that depends on their order shows.
    template <class F>
    void each(F f) {
        for (int t = Size - 1; t >= 0; --t) f(t);
    }
    void barrier() {}
    void inclusive_scan(int64_t* values) {
        for (int t = 1; t < Size; ++t) values[t] += values[t - 1];
    }
    void add(int* p, int x) { __atomic_fetch_add(p, x, __ATOMIC_RELAXED); }  // blocks of other threads add as well
    void add_if(bool hit, int* p, int x) { *p += hit ? x : 0; }
    void max(int* p, int x) { *p = std::max(*p, x); }
    void set(unsigned* p, unsigned bits) { *p |= bits; }
    int count_one_more(bool own, int* count, int i) { return own ? count[i]++ : 0; }
};

template <int Block>
struct HostGrid {
    int threads;

    template <class F>
    void each(int64_t count, F f) {
        share_items(count, threads, [&](int64_t i, int) {
            HostBlock<Block> exec;
            Shared<Block> shared;
            f(exec, shared, int(i));
        });
    }
    template <class F>
    auto all(F f) {
        HostBlock<Block> exec;
        Shared<Block> shared;
        return f(exec, shared);
    }
    template <class F>
    void first(F f) { all(f); }
};

template <class Real, int Block>
void count(const CountArgs& a, int threads) {
    HostGrid<Block> grid{threads};
    grid.each(a.batch, [&](auto& exec, auto& shared, int b) { count_sample<Real>(exec, shared, a, b); });
    place_samples<Real>(grid, a);
}

template <int Block>
void fill(const FillArgs& a, int threads) {
    const int64_t ints = scratch_ints(a.cells, a.axes, Block);
    share_items(a.batch, threads, [&](int64_t b, int worker) {
        HostBlock<Block> exec;
        Shared<Block> shared;
        fill_sample(exec, shared, a, int(b), a.scratch + worker * ints);
    });
    HostBlock<Block> exec;
    fill_tail(exec, a, 0, 1);
}

}  // namespace

void plan_count_cpu(const CountArgs& a, bool is_double, int threads, int block) {
    auto run = block == 1 ? (is_double ? count<double, 1> : count<float, 1>)
                          : (is_double ? count<double, 64> : count<float, 64>);
    run(a, threads);
}

void plan_fill_cpu(const FillArgs& a, int threads, int block) { (block == 1 ? fill<1> : fill<64>)(a, threads); }

void move_rows_cpu(const RowArgs& a, int threads) {
    constexpr int64_t kRun = 256;  // a row alone is too little for a thread to fetch
    share_runs(a.rows, kRun, threads, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            const int64_t row = a.index[i];
            char* out = a.out + (a.scatter ? row : i) * a.out_pitch;
            if (row >= 0) std::memcpy(out, a.x + (a.scatter ? i : row) * a.x_pitch, a.bytes);
            else if (!a.scatter) std::memset(out, 0, a.bytes);
        }
    });
}

}  // namespace dcdit
