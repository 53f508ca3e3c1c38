// Running sums, and the largest keys, by a block of threads.
//
// Block algorithms of plan_chunks are written over an executor, a block of Exec::size threads that runs in phases:
//
//   exec.each(f)             f(thread) on every thread, then a barrier
//   exec.barrier()           between a value read by every thread and the phase that overwrites it
//   exec.inclusive_scan(v)   running sums of v[0 .. size), in place, then a barrier
//   exec.add(p, x), exec.max(p, x), exec.set(p, bits)   atomic where threads run at once
//   exec.add_if(hit, p, x)   without a jump where that is faster: a processor cannot guess which cells are kept
//   exec.count_one_more(own, count, i)   by all Exec::lanes threads of a gang at once: where `own`, returns count[i] as if
//                                        they came one after the other, and adds one; no other gang touches count[i]
//
// CUDA runs a block of 1024 threads per sample, the CPU a block of one. Tests run many threads on the CPU as well, so
// that the code for CUDA is tried and sanitised where there is no GPU.
//
// What concerns the whole batch is written over a grid of such blocks:
//
//   grid.each(n, f)          f(exec, shared, i) for i < n, each by one block, then a barrier of all blocks
//   grid.all(f)              what f(exec, shared) returns; every block computes it
//   grid.first(f)            f(exec, shared) by one block
#pragma once

#include <climits>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define HD __device__ __forceinline__
#else
#define HD inline
#endif

namespace dcdit {

// Places of the highest and of the lowest bit that is set; there is one.
#ifdef __CUDA_ARCH__
HD int highest_bit(unsigned bits) { return 31 - __clz(int(bits)); }
HD int lowest_bit(unsigned bits) { return __ffs(int(bits)) - 1; }
#else
HD int highest_bit(unsigned bits) { return 31 - __builtin_clz(bits); }
HD int lowest_bit(unsigned bits) { return __builtin_ctz(bits); }
#endif

// Shared by the threads of one block.
template <int Size>
struct Shared {
    int64_t values[Size];
    int64_t carry;
    int histogram[256];
    int count, forced, improper, digit, before, first, longest, live;
};

// store(i, sum of load(0 .. i)) for i < n; returns the whole sum.
template <class Exec, class Block, class Load, class Store>
HD int64_t scan(Exec& exec, Block& shared, int64_t n, Load load, Store store) {
    if constexpr (Exec::size == 1) {
        int64_t sum = 0;
        for (int64_t i = 0; i < n; ++i) store(i, sum += load(i));
        return sum;
    } else {
        exec.each([&](int t) { if (t == 0) shared.carry = 0; });
        for (int64_t start = 0; start < n; start += Exec::size) {
            exec.each([&](int t) {
                shared.values[t] = (start + t < n ? load(start + t) : 0) + (t == 0 ? shared.carry : 0);
            });
            exec.inclusive_scan(shared.values);
            exec.each([&](int t) {
                if (start + t < n) store(start + t, shared.values[t]);
                if (t == Exec::size - 1) shared.carry = shared.values[t];
            });
        }
        int64_t sum = shared.carry;
        exec.barrier();
        return sum;
    }
}

// Two counts below 2^31 in one scanned value.
HD int64_t pair(int64_t high, int64_t low) { return high << 32 | low; }

// The cells that stay: those with a key above `key`, and the first `equals` of those with this key. A selection finds the
// key eight bits at a time, largest digit first; in between `equals` is its place among the keys with those digits.
template <class Key>
struct Cut {
    static constexpr int first_shift = 8 * sizeof(Key) - 8;
    Key key;
    int equals;
};

// histogram[255 - d]: cells with valid(i) whose key has the cut's digits so far and d next.
template <class Key, class Exec, class Valid, class Load>
HD void count_digits(Exec& exec, int* histogram, int64_t n, Cut<Key> cut, int shift, Valid valid, Load load) {
    exec.each([&](int t) {
        for (int i = t; i < 256; i += Exec::size) histogram[i] = 0;
    });
    exec.each([&](int t) {
        for (int64_t i = t; i < n; i += Exec::size) {
            const Key key = load(i);
            const bool hit = valid(i) & ((key ^ cut.key) >> shift < 256);
            exec.add_if(hit, &histogram[255 - (key >> shift & 255)], 1);
        }
    });
}

// The cut with one digit more. Where no cell is to stay, all digits are 255. A barrier must come before the next call.
template <class Key, class Exec, class Block>
HD Cut<Key> next_digit(Exec& exec, Block& shared, const int* histogram, Cut<Key> cut, int shift) {
    exec.each([&](int t) { if (t == 0) shared.digit = 255, shared.before = 0; });
    scan(
        exec, shared, 256, [&](int64_t i) -> int64_t { return histogram[i]; },
        [&](int64_t i, int64_t sum) {
            const int64_t before = sum - histogram[i];
            if (before < cut.equals && cut.equals <= sum) {
                shared.digit = 255 - int(i);
                shared.before = int(before);
            }
        });
    return {cut.key | Key(shared.digit) << shift, cut.equals - shared.before};
}

// store(i, sum, before), where `sum` of the cells with valid(i) stay up to and with cell i, and before() up to and with
// the cell before.
template <class Key, class Exec, class Block, class Valid, class Load, class Store>
HD void keep_above(Exec& exec, Block& shared, int64_t n, Cut<Key> cut, Valid valid, Load key, Store store) {
    auto kept = [&](int64_t sums) {
        const int64_t equal = sums & 0x7fffffff;
        return int(sums >> 32) + int(equal < cut.equals ? equal : cut.equals);
    };
    auto load = [&](int64_t i) {
        const Key own = key(i);
        const bool good = valid(i);
        return pair(good & (own > cut.key), good & (own == cut.key));
    };
    scan(exec, shared, n, load, [&](int64_t i, int64_t sums) {
        store(i, kept(sums), [&] { return kept(sums - load(i)); });
    });
}

}  // namespace dcdit
