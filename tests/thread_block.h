// A block of real threads, which as on CUDA run the whole body and meet at the barriers; ThreadSanitizer watches.
#pragma once

#include <pthread.h>

#include <array>
#include <thread>
#include <vector>

#include "plan.h"

namespace dcdit {

constexpr int kThreads = 4;
inline pthread_barrier_t meeting;

struct ThreadBlock {
    static constexpr int size = kThreads, lanes = 1;
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
    void set(unsigned* p, unsigned bits) { __atomic_fetch_or(p, bits, __ATOMIC_RELAXED); }
    int count_one_more(bool own, int* count, int i) { return own ? count[i]++ : 0; }
};

// f by every thread of a block; the value that they all return.
template <class F>
auto as_block(F f) {
    static Shared<kThreads> shared;
    using Value = decltype(f(std::declval<ThreadBlock&>(), shared));
    std::array<Value, kThreads> values;
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) threads.emplace_back([&, t] { ThreadBlock exec{t}; values[t] = f(exec, shared); });
    for (auto& thread : threads) thread.join();
    return values[0];
}

struct ThreadGrid {
    // Blocks from the last to the first: a result that depends on their order shows.
    template <class F>
    void each(int count, F f) {
        for (int i = count - 1; i >= 0; --i) as_block([&](auto& exec, auto& shared) { return f(exec, shared, i), 0; });
    }
    template <class F>
    auto all(F f) { return as_block(f); }
    template <class F>
    void first(F f) {
        each(1, [&](auto& exec, auto& shared, int) { f(exec, shared); });
    }
};

}  // namespace dcdit
