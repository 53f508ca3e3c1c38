// Shared by the CPU loops: code for AVX2 beside the plain one, sums that vectorise, and runs of rows over threads.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>
#include <type_traits>
#include <vector>

// Such a function is compiled for AVX2 with FMA as well, and the loader picks.
#if defined(__x86_64__) && defined(__GLIBC__) && __GNUC__ >= 12 && !defined(__clang__)
#define DCDIT_CLONES __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define DCDIT_CLONES
#endif
#define DCDIT_INLINE inline __attribute__((always_inline))

namespace dcdit {

template <class To, class From>
DCDIT_INLINE To bits_as(From from) {
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// A number in memory; loops compute in float, and round to the nearest, ties to even, where they write.
struct BFloat16 {
    uint16_t bits;
    BFloat16() = default;
    DCDIT_INLINE BFloat16(float x) {
        const uint32_t wide = bits_as<uint32_t>(x), rounded = wide + 0x7FFF + ((wide >> 16) & 1);
        bits = uint16_t(((wide & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC00000 : rounded) >> 16);  // NaN stays one
    }
    DCDIT_INLINE operator float() const { return bits_as<float>(uint32_t(bits) << 16); }
};

// What numbers of type T are computed in.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, BFloat16>, float, T>;

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

// The address `by` numbers further on; of a tensor that is not given, none.
template <class Real>
Real* offset(Real* tensor, int64_t by) {
    return tensor ? tensor + by : nullptr;
}

// work() in each of `threads` threads: PyTorch's OpenMP threads, if OpenMP is loaded, since idle OpenMP workers spin for
// a while and would hold the cores against other threads.
template <class F>
void in_parallel(int threads, F work) {
    if (threads <= 1) return work();
    using Pool = void (*)(void (*)(void*), void*, unsigned, unsigned);
    static const Pool pool = reinterpret_cast<Pool>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    if (pool) return pool([](void* f) { (*static_cast<F*>(f))(); }, &work, threads, 0);
    std::vector<std::thread> others;
    for (int worker = 1; worker < threads; ++worker) others.emplace_back([&] { work(); });
    work();
    for (auto& thread : others) thread.join();
}

// f(item, worker) for every item below `count`; a worker takes the next one that is left.
template <class F>
void share_items(int64_t count, int threads, F f) {
    std::atomic<int64_t> next{0};
    std::atomic<int> workers{0};
    in_parallel(std::min<int64_t>(threads, count), [&] {
        const int worker = workers++;
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) f(i, worker);
    });
}

// f(first, last) over runs of `grain` items.
template <class F>
void share_runs(int64_t count, int64_t grain, int threads, F f) {
    share_items((count + grain - 1) / grain, threads,
                [&](int64_t i, int) { f(i * grain, std::min((i + 1) * grain, count)); });
}

}  // namespace dcdit
