// What the CPU loops share: code for AVX2 beside the plain one, sums that vectorise, and runs of rows over threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

// Such a function is compiled for AVX2 with FMA as well, and the loader picks.
#if defined(__x86_64__) && defined(__GLIBC__) && __GNUC__ >= 12 && !defined(__clang__)
#define DCDIT_CLONES __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define DCDIT_CLONES
#endif
#define DCDIT_INLINE inline __attribute__((always_inline))

namespace dcdit {

// Σ_d f(d), in sixteen partial sums so that it vectorises without reordering anything.
template <class Real, class F>
DCDIT_INLINE Real lane_sum(int64_t width, F f) {
    Real part[16] = {};
    int64_t d = 0;
    for (; d + 16 <= width; d += 16)
        for (int i = 0; i < 16; ++i) part[i] += f(d + i);
    for (; d < width; ++d) part[0] += f(d);
    Real total = 0;
    for (Real p : part) total += p;
    return total;
}

// f(first, last) over runs of `grain` items.
template <class F>
void share_runs(int64_t count, int64_t grain, int threads, F f) {
    std::atomic<int64_t> next{0};
    auto work = [&] {
        for (int64_t i; (i = next.fetch_add(grain, std::memory_order_relaxed)) < count;) f(i, std::min(i + grain, count));
    };
    std::vector<std::thread> others;
    for (int worker = 1; worker < threads && worker * grain < count; ++worker) others.emplace_back(work);
    work();
    for (auto& thread : others) thread.join();
}

}  // namespace dcdit
