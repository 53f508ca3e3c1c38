// Block algorithms of plan_chunks, written over an executor: a block of Exec::size threads that runs in phases.
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
// that what CUDA compiles is tried and sanitised where there is no GPU.
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

enum Mode : int { kGrid = 0, kLine = 1, kPrevious = 2 };

struct CountArgs {
    const void* prob;       // (batch, cells) float or double
    const uint8_t* keep;    // (batch, cells), or null: boundaries whatever their probability, and the last to be dropped
    const uint8_t* ban;     // (batch, cells), or null: no boundaries, and their numbers are not looked at; goes before `keep`
    const float* fraction;  // (batch,), or null: `fraction_all` for every sample
    float fraction_all;
    double threshold;
    int batch;
    int64_t cells;
    int64_t capacity;  // -1: as many rows as are retained
    int mode;
    int* prefix;       // (batch, cells): retained cells up to and with this one
    int* info;         // (batch, 3): retained cells; the first of them; cells past max_seqlen, or -1 where a cell is improper
    int* member_base;  // (batch + 1,): refilled cells of the samples before
    int* cu_seqlens;   // (batch + 1,)
    int* overflow;     // ()
    int* status;       // (2,): retained cells of the batch, or -1 where a cell is improper; longest sample
    int max_seqlen = INT_MAX;  // cells that a sample retains at most
};

struct FillArgs {
    int dim[3];
    int axes;
    int batch;
    int64_t cells;
    int64_t capacity;
    int mode;
    const int* prefix;
    const int* member_base;
    const int* cu_seqlens;
    int* token_index;
    int* sample_index;
    int* nearest;
    int* member_offsets;
    int* member_index;
    int* scratch;  // scratch_ints() for each block that runs at once
};

// What the threads of one block share.
template <int Size>
struct Shared {
    int64_t values[Size];
    int64_t carry;
    int histogram[256];
    int count, forced, improper, digit, before, first, longest;
};

// The bits of a number above 0, as an unsigned integer, are in the order of the numbers.
HD uint32_t ordered(float p) {
    uint32_t bits;
    memcpy(&bits, &p, sizeof bits);
    return bits;
}
HD uint64_t ordered(double p) {
    uint64_t bits;
    memcpy(&bits, &p, sizeof bits);
    return bits;
}

// The cells of one sample.
template <class Real>
struct Cells {
    const Real* prob;
    const uint8_t *keep, *ban;
    Real threshold;

    HD Cells(const CountArgs& a, int b)
        : prob(static_cast<const Real*>(a.prob) + b * a.cells), keep(a.keep ? a.keep + b * a.cells : nullptr),
          ban(a.ban ? a.ban + b * a.cells : nullptr), threshold(Real(a.threshold)) {}

    HD bool banned(int64_t i) const { return ban && ban[i]; }
    HD bool forced(int64_t i) const { return keep && keep[i] && !banned(i); }
    HD bool boundary(int64_t i) const { return forced(i) | (!banned(i) & (prob[i] > threshold)); }
    // A number outside [0, 1], NaN among them, or a cell both kept and banned.
    HD bool improper(int64_t i) const {
        return banned(i) ? keep && keep[i] : !((prob[i] >= 0) & (prob[i] <= 1));
    }
    // What boundaries are ordered by: the larger stays.
    HD auto key(int64_t i) const {
        const auto bits = ordered(prob[i]);
        return forced(i) ? decltype(bits)(~0ull) : bits;
    }
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

// The keep-th largest key among those with valid(i), and how many keys equal to it are among the `keep` largest: eight
// bits at a time, largest digit first.
template <class Key, class Exec, class Block, class Valid, class Load>
HD Key select(Exec& exec, Block& shared, int64_t n, int keep, Valid valid, Load load, int* equals) {
    Key chosen = 0;
    for (int shift = 8 * sizeof(Key) - 8; shift >= 0; shift -= 8) {
        exec.each([&](int t) {
            for (int i = t; i < 256; i += Exec::size) shared.histogram[i] = 0;
        });
        exec.each([&](int t) {
            for (int64_t i = t; i < n; i += Exec::size) {
                const Key key = load(i);
                const bool hit = valid(i) & ((key ^ chosen) >> shift < 256);
                exec.add_if(hit, &shared.histogram[255 - (key >> shift & 255)], 1);
            }
        });
        scan(
            exec, shared, 256, [&](int64_t i) -> int64_t { return shared.histogram[i]; },
            [&](int64_t i, int64_t sum) {
                const int64_t before = sum - shared.histogram[i];
                if (before < keep && keep <= sum) {
                    shared.digit = 255 - int(i);
                    shared.before = int(before);
                }
            });
        chosen |= Key(shared.digit) << shift;
        keep -= shared.before;  // two barriers before either is written again
    }
    *equals = keep;
    return chosen;
}

// Threshold and tail drop of sample b: prefix and info.
template <class Real, class Exec, class Block>
HD void count_sample(Exec& exec, Block& shared, const CountArgs& a, int b) {
    const Cells<Real> cell(a, b);
    using Key = decltype(ordered(Real()));

    exec.each([&](int t) { if (t == 0) shared.count = shared.forced = shared.improper = 0, shared.first = -1; });
    exec.each([&](int t) {
        int count = 0, forced = 0, improper = 0;
        for (int64_t i = t; i < a.cells; i += Exec::size) {
            count += cell.boundary(i);
            forced += cell.forced(i);
            improper += cell.improper(i);
        }
        if (count) exec.add(&shared.count, count);
        if (forced) exec.add(&shared.forced, forced);
        if (improper) exec.add(&shared.improper, improper);
    });
    const int count = shared.count;
    const float dropped = float(count) * (a.fraction ? a.fraction[b] : a.fraction_all);
    const int rest = dropped >= float(count) ? 0 : dropped >= 1 ? count - int(dropped) : count;
    const int budget = rest > shared.forced ? rest : shared.forced;
    const int keep = budget < a.max_seqlen ? budget : a.max_seqlen;

    // A boundary stays where its key is above `cut`, and so do the first `equals` of those equal to it.
    Key cut = 0;
    int equals = 0;
    if (keep == 0) cut = ~Key(0);
    if (0 < keep && keep < count) {
        cut = select<Key>(
            exec, shared, a.cells, keep, [&](int64_t i) { return cell.boundary(i); },
            [&](int64_t i) { return cell.key(i); }, &equals);
    }
    int* prefix = a.prefix + b * a.cells;
    auto kept = [&](int64_t sums) {
        const int64_t equal = sums & 0x7fffffff;
        return int(sums >> 32) + int(equal < equals ? equal : equals);
    };
    auto load = [&](int64_t i) {
        const Key key = cell.key(i);
        const bool boundary = cell.boundary(i);
        return pair(boundary & (key > cut), boundary & (key == cut));
    };
    scan(exec, shared, a.cells, load, [&](int64_t i, int64_t sums) {
        prefix[i] = kept(sums);
        if (prefix[i] == 1 && kept(sums - load(i)) == 0) shared.first = int(i);
    });
    exec.each([&](int t) {
        if (t == 0) {
            a.info[3 * b] = keep;
            a.info[3 * b + 1] = shared.first;
            a.info[3 * b + 2] = shared.improper ? -1 : budget - keep;
        }
    });
}

// Where each sample's rows and refilled cells start, and the two integers the host waits for.
template <class Exec, class Block>
HD void place_samples(Exec& exec, Block& shared, const CountArgs& a) {
    exec.each([&](int t) { if (t == 0) shared.longest = shared.improper = shared.count = 0, a.cu_seqlens[0] = a.member_base[0] = 0; });
    const int64_t capacity = a.capacity < 0 ? a.batch * a.cells : a.capacity;
    auto fits = [&](int64_t rows) { return int(rows < capacity ? rows : capacity); };
    const int64_t total = scan(
        exec, shared, a.batch,
        [&](int64_t b) {
            exec.max(&shared.longest, a.info[3 * b]);
            const int past = a.info[3 * b + 2];
            if (past < 0) exec.max(&shared.improper, 1);
            if (past > 0) exec.add(&shared.count, past);
            return int64_t(a.info[3 * b]);
        },
        [&](int64_t b, int64_t sum) { a.cu_seqlens[b + 1] = fits(sum); });
    scan(
        exec, shared, a.batch,
        [&](int64_t b) {
            if (a.cu_seqlens[b + 1] == a.cu_seqlens[b]) return int64_t(0);
            return a.cells - (a.mode == kPrevious ? a.info[3 * b + 1] : 0);
        },
        [&](int64_t b, int64_t sum) { a.member_base[b + 1] = int(sum); });
    exec.each([&](int t) {
        if (t == 0) {
            *a.overflow = int(total - fits(total)) + shared.count;
            a.status[0] = shared.improper ? -1 : int(total);
            a.status[1] = shared.longest;
        }
    });
}

}  // namespace dcdit
