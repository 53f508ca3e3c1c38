// A block of real threads, as on CUDA: every thread runs the whole body and meets the others at the barriers.
// Built with -fsanitize=thread by test_csrc.py; results must be those of the CPU's block of one.
#include <pthread.h>

#include <algorithm>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

#include "fill.h"
#include "launch.h"

using namespace dcdit;

constexpr int kThreads = 4;
pthread_barrier_t meeting;

struct ThreadBlock {
    static constexpr int size = kThreads;
    int thread;

    template <class F>
    void each(F f) {
        f(thread);
        barrier();
    }
    void barrier() { pthread_barrier_wait(&meeting); }
    void inclusive_scan(int64_t* values) {
        if (thread == 0) for (int t = 1; t < size; ++t) values[t] += values[t - 1];
        barrier();
    }
    void add(int* p, int x) { __atomic_fetch_add(p, x, __ATOMIC_RELAXED); }
    void add_if(bool hit, int* p, int x) { if (hit) add(p, x); }
    void max(int* p, int x) {
        int seen = __atomic_load_n(p, __ATOMIC_RELAXED);
        while (seen < x && !__atomic_compare_exchange_n(p, &seen, x, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    }
};

template <class F>
void as_block(F f) {
    static Shared<kThreads> shared;
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) threads.emplace_back([&, t] { ThreadBlock exec{t}; f(exec, shared); });
    for (auto& thread : threads) thread.join();
}

struct Plan {
    std::vector<int> prefix, info, base, cu, overflow, status, token, sample, nearest, offsets, member, scratch;
    bool operator==(const Plan& o) const {
        return status == o.status && cu == o.cu && token == o.token && sample == o.sample && nearest == o.nearest &&
               offsets == o.offsets && member == o.member && overflow == o.overflow;
    }
};

Plan plan(const std::vector<float>& prob, int batch, std::array<int, 3> dim, int axes, int mode, int capacity, bool block) {
    const int64_t cells = int64_t(dim[0]) * dim[1] * dim[2];
    Plan p;
    for (auto* v : {&p.prefix, &p.nearest, &p.member}) v->resize(batch * cells);
    p.info.resize(3 * batch), p.base.resize(batch + 1), p.cu.resize(batch + 1), p.overflow.resize(1), p.status.resize(2);
    p.token.resize(capacity), p.sample.resize(capacity), p.offsets.resize(capacity + 1), p.scratch.resize(16 * cells);
    CountArgs c{prob.data(), nullptr, 0.4f, 0.5, batch, cells, capacity, mode, p.prefix.data(), p.info.data(),
                p.base.data(), p.cu.data(), p.overflow.data(), p.status.data()};
    FillArgs f{{dim[0], dim[1], dim[2]}, axes, batch, cells, capacity, mode, p.prefix.data(), p.base.data(), p.cu.data(),
               p.token.data(), p.sample.data(), p.nearest.data(), p.offsets.data(), p.member.data(), p.scratch.data()};
    if (!block) return plan_count_cpu(c, false, 1, 1), plan_fill_cpu(f, 1, 1), p;
    for (int b = 0; b < batch; ++b) as_block([&](auto& exec, auto& shared) { count_sample<float>(exec, shared, c, b); });
    as_block([&](auto& exec, auto& shared) { place_samples(exec, shared, c); });
    for (int b = 0; b < batch; ++b)
        as_block([&](auto& exec, auto& shared) { fill_sample(exec, shared, f, b, f.scratch); });
    as_block([&](auto& exec, auto&) { fill_tail(exec, f, 0, 1); });
    return p;
}

int main() {
    pthread_barrier_init(&meeting, nullptr, kThreads);
    std::mt19937 random(0);
    const std::array<int, 3> grids[] = {{7, 9, 1}, {1, 13, 1}, {2, 3, 4}, {16, 5, 1}};
    for (auto dim : grids)
        for (int mode : {kGrid, kLine, kPrevious})
            for (int capacity : {3, 90, 400}) {
                const int batch = 3, cells = dim[0] * dim[1] * dim[2];
                std::vector<float> prob(batch * cells);
                for (size_t i = 0; i < prob.size(); ++i) prob[i] = i < size_t(cells) ? 0 : (random() % 8) / 8.0f;
                const int axes = dim[2] > 1 ? 3 : 2;
                if (!(plan(prob, batch, dim, axes, mode, capacity, true) == plan(prob, batch, dim, axes, mode, capacity, false)))
                    return std::puts("results differ"), 1;
            }
    std::puts("clean");
}
