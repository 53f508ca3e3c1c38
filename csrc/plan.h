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
// that the code for CUDA is tried and sanitised where there is no GPU.
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
    const int* rows;        // (batch,), or null: `rows_all` for every sample
    int64_t rows_all;       // the most probable cells of a sample, so many of them; -1: no such budget
    int64_t budget;         // the most probable cells of the batch, so many of them; -1: no such budget
    double threshold;
    int batch;
    int64_t cells;
    int64_t capacity;  // rows; past them the least probable cells of the batch go; -1: as many as are retained
    int mode;
    int* prefix;       // (batch, cells): retained cells up to and with each cell
    int* sums;         // (batch, cells), or null where there is neither capacity nor budget
    int* info;         // (batch, 4): retained cells; the first retained cell; cells past max_seqlen, or -1 for bad input; forced cells
    int* member_base;  // (batch + 1,): refilled cells of the samples before
    int* cu_seqlens;   // (batch + 1,)
    int* overflow;     // ()
    int* status;       // (2,): retained cells of the batch, or -1 for bad input; longest sample
    int max_seqlen = INT_MAX;  // cells that a sample retains at most

    // Any cell may then be retained, whatever the threshold.
    HD bool budgeted() const { return rows || rows_all >= 0 || budget >= 0; }
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

// Shared by the threads of one block.
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

// The cells of the samples from the b-th on.
template <class Real>
struct Cells {
    using Key = decltype(ordered(Real()));
    const Real* prob;
    const uint8_t *keep, *ban;
    Real threshold;
    unsigned cells;
    bool budgeted;

    HD Cells(const CountArgs& a, int b)
        : prob(static_cast<const Real*>(a.prob) + b * a.cells), keep(a.keep ? a.keep + b * a.cells : nullptr),
          ban(a.ban ? a.ban + b * a.cells : nullptr), threshold(Real(a.threshold)), cells(unsigned(a.cells)),
          budgeted(a.budgeted()) {}

    HD bool banned(int64_t i) const { return ban && ban[i]; }
    // A sample's first and last cell, as a router forces them: others may have rounded to a probability of 1 as well.
    HD bool forced_end(int64_t i) const {
        return budgeted && prob[i] >= 1 && (unsigned(i) % cells == 0 || (unsigned(i) + 1) % cells == 0);
    }
    HD bool forced(int64_t i) const { return ((keep && keep[i]) || forced_end(i)) && !banned(i); }
    HD bool candidate(int64_t i) const { return forced(i) || (!banned(i) && (budgeted || prob[i] > threshold)); }
    // A number outside [0, 1], NaN among them, or a cell both kept and banned.
    HD bool improper(int64_t i) const { return banned(i) ? keep && keep[i] : !((prob[i] >= 0) & (prob[i] <= 1)); }
    // The order of candidates: the larger key stays.
    HD Key key(int64_t i) const { return forced(i) ? ~Key(0) : prob[i] > 0 ? ordered(prob[i]) : 0; }
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
            if (t == 0) shared.digit = shared.before = 0;
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
        keep -= shared.before;  // a barrier before either is written again
    }
    *equals = keep;
    return chosen;
}

// Of the `count` cells with valid(i) the `keep` of largest key stay, of equal keys the first: store(i, sum, before), where
// `sum` cells stay up to and with cell i, and before() up to and with the cell before.
template <class Key, class Exec, class Block, class Valid, class Load, class Store>
HD void keep_largest(Exec& exec, Block& shared, int64_t n, int keep, int count, Valid valid, Load key, Store store) {
    // A cell stays where its key is above `cut`, and so do the first `equals` of those equal to it.
    Key cut = keep == 0 ? ~Key(0) : 0;
    int equals = keep == 0 ? 0 : INT_MAX;
    if (0 < keep && keep < count) cut = select<Key>(exec, shared, n, keep, valid, key, &equals);
    auto kept = [&](int64_t sums) {
        const int64_t equal = sums & 0x7fffffff;
        return int(sums >> 32) + int(equal < equals ? equal : equals);
    };
    auto load = [&](int64_t i) {
        const Key own = key(i);
        const bool good = valid(i);
        return pair(good & (own > cut), good & (own == cut));
    };
    scan(exec, shared, n, load, [&](int64_t i, int64_t sums) {
        store(i, kept(sums), [&] { return kept(sums - load(i)); });
    });
}

// Threshold, and tail drop or budget, of sample b: prefix and info.
template <class Real, class Exec, class Block>
HD void count_sample(Exec& exec, Block& shared, const CountArgs& a, int b) {
    const Cells<Real> cell(a, b);

    exec.each([&](int t) { if (t == 0) shared.count = shared.forced = shared.improper = 0, shared.first = -1; });
    exec.each([&](int t) {
        int count = 0, forced = 0, improper = 0;
        for (int64_t i = t; i < a.cells; i += Exec::size) {
            count += cell.candidate(i);
            forced += cell.forced(i);
            improper += cell.improper(i);
        }
        if (count) exec.add(&shared.count, count);
        if (forced) exec.add(&shared.forced, forced);
        if (improper) exec.add(&shared.improper, improper);
    });
    const int count = shared.count, forced = shared.forced;
    int wanted = count;
    bool bad = shared.improper;
    if (a.budgeted()) {
        const int64_t rows = a.rows ? a.rows[b] : a.rows_all >= 0 ? a.rows_all : a.cells;
        bad |= rows < forced || rows > a.cells;
        wanted = rows < 0 ? 0 : rows < count ? int(rows) : count;
    } else {
        const float dropped = float(count) * (a.fraction ? a.fraction[b] : a.fraction_all);
        const int rest = dropped >= float(count) ? 0 : dropped >= 1 ? count - int(dropped) : count;
        wanted = rest > forced ? rest : forced;
    }
    const int keep = wanted < a.max_seqlen ? wanted : a.max_seqlen;
    int* prefix = a.prefix + b * a.cells;
    keep_largest<typename Cells<Real>::Key>(
        exec, shared, a.cells, keep, count, [&](int64_t i) { return cell.candidate(i); },
        [&](int64_t i) { return cell.key(i); },
        [&](int64_t i, int sum, auto before) {
            prefix[i] = sum;
            if (sum == 1 && before() == 0) shared.first = int(i);
        });
    exec.each([&](int t) {
        if (t == 0) {
            int* info = a.info + 4 * b;
            info[0] = keep, info[1] = shared.first, info[2] = bad ? -1 : wanted - keep, info[3] = forced;
        }
    });
}

// Of the `count` retained cells of the batch the `most` most probable stay: prefix and info once more, by one block.
template <class Real, class Exec, class Block>
HD void drop_least_probable(Exec& exec, Block& shared, const CountArgs& a, int most, int count) {
    const Cells<Real> cell(a, 0);
    const int64_t n = a.batch * a.cells;
    const unsigned cells = unsigned(a.cells);
    const int* prefix = a.prefix;
    keep_largest<typename Cells<Real>::Key>(
        exec, shared, n, most, count,
        // Retained cells are counted from 1 in each sample; few cells need the division.
        [&](int64_t i) { return prefix[i] == (i ? prefix[i - 1] : 0) + 1 || (prefix[i] == 1 && unsigned(i) % cells == 0); },
        [&](int64_t i) { return cell.key(i); }, [&](int64_t i, int sum, auto) { a.sums[i] = sum; });
    exec.each([&](int t) {
        for (int64_t i = t; i < n; i += Exec::size) {
            const int64_t b = unsigned(i) / cells, start = b * a.cells;
            const int earlier = start ? a.sums[start - 1] : 0, sum = a.sums[i] - earlier;
            a.prefix[i] = sum;
            if (sum == 1 && (i == start || a.sums[i - 1] == earlier)) a.info[4 * b + 1] = int(i - start);
            if (i == start + a.cells - 1) a.info[4 * b] = sum;
        }
    });
}

// Where each sample's rows and refilled cells start, and the two integers the host waits for.
template <class Real, class Exec, class Block>
HD void place_samples(Exec& exec, Block& shared, const CountArgs& a) {
    exec.each([&](int t) { if (t == 0) shared.improper = shared.count = shared.forced = 0, a.cu_seqlens[0] = a.member_base[0] = 0; });
    exec.each([&](int t) {
        for (int b = t; b < a.batch; b += Exec::size) {
            const int past = a.info[4 * b + 2];
            if (past < 0) exec.max(&shared.improper, 1);
            if (past > 0) exec.add(&shared.count, past);
            if (a.budget >= 0) exec.add(&shared.forced, a.info[4 * b + 3]);
        }
    });
    auto place = [&] {
        exec.each([&](int t) { if (t == 0) shared.longest = 0; });
        return scan(
            exec, shared, a.batch,
            [&](int64_t b) {
                exec.max(&shared.longest, a.info[4 * b]);
                return int64_t(a.info[4 * b]);
            },
            [&](int64_t b, int64_t sum) { a.cu_seqlens[b + 1] = int(sum); });
    };
    int64_t live = place(), wanted = live + shared.count;
    if (a.budget >= 0 && a.budget < wanted) wanted = a.budget;
    int64_t most = a.capacity < 0 ? live : a.capacity;
    if (a.budget >= 0 && a.budget < most) most = a.budget;
    if (most < live) {
        drop_least_probable<Real>(exec, shared, a, int(most), int(live));
        live = place();
    }
    scan(
        exec, shared, a.batch,
        [&](int64_t b) {
            if (a.cu_seqlens[b + 1] == a.cu_seqlens[b]) return int64_t(0);
            return a.cells - (a.mode == kPrevious ? a.info[4 * b + 1] : 0);
        },
        [&](int64_t b, int64_t sum) { a.member_base[b + 1] = int(sum); });
    exec.each([&](int t) {
        if (t == 0) {
            const bool bad = shared.improper || (a.budget >= 0 && a.budget < shared.forced);
            *a.overflow = int(wanted - live);
            a.status[0] = bad ? -1 : int(live);
            a.status[1] = shared.longest;
        }
    });
}

}  // namespace dcdit
