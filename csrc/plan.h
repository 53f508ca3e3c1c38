// The first half of plan_chunks: which cells each sample and the batch retain, and where their rows begin.
#pragma once

#include "select.h"

namespace dcdit {

constexpr int kDigits = 8 * 256;

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
    int* sums;         // (batch, cells), then digits(); or null where there is neither capacity nor budget
    int* info;         // (batch, 4): retained cells; the first retained cell; cells past max_seqlen, or -1 for bad input; forced cells
    int* member_base;  // (batch + 1,): refilled cells of the samples before
    int* cu_seqlens;   // (batch + 1,)
    int* overflow;     // ()
    int* status;       // (2,): retained cells of the batch, or -1 for bad input; longest sample
    int max_seqlen = INT_MAX;  // cells that a sample retains at most

    // Any cell may then be retained, whatever the threshold.
    HD bool budgeted() const { return rows || rows_all >= 0 || budget >= 0; }
    // kDigits counts: the batch's retained cells by each digit of their keys.
    HD int* digits() const { return sums + batch * cells; }
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

// The cells of sample b.
template <class Real>
struct Cells {
    using Key = decltype(ordered(Real()));
    const Real* prob;
    const uint8_t *keep, *ban;
    const int* prefix;
    Real threshold;
    int64_t cells;
    bool budgeted;

    HD Cells(const CountArgs& a, int b)
        : prob(static_cast<const Real*>(a.prob) + b * a.cells), keep(a.keep ? a.keep + b * a.cells : nullptr),
          ban(a.ban ? a.ban + b * a.cells : nullptr), prefix(a.prefix + b * a.cells), threshold(Real(a.threshold)),
          cells(a.cells), budgeted(a.budgeted()) {}

    HD bool banned(int64_t i) const { return ban && ban[i]; }
    // A sample's first and last cell, as a router forces them: others may have rounded to a probability of 1 as well.
    HD bool forced_end(int64_t i) const { return budgeted && prob[i] >= 1 && (i == 0 || i + 1 == cells); }
    HD bool forced(int64_t i) const { return ((keep && keep[i]) || forced_end(i)) && !banned(i); }
    HD bool candidate(int64_t i) const { return forced(i) || (!banned(i) && (budgeted || prob[i] > threshold)); }
    // A number outside [0, 1], NaN among them, or a cell both kept and banned.
    HD bool improper(int64_t i) const { return banned(i) ? keep && keep[i] : !((prob[i] >= 0) & (prob[i] <= 1)); }
    // The order of candidates: the larger key stays.
    HD Key key(int64_t i) const { return forced(i) ? ~Key(0) : prob[i] > 0 ? ordered(prob[i]) : 0; }
    // Once `prefix` is written.
    HD bool retained(int64_t i) const { return prefix[i] != (i ? prefix[i - 1] : 0); }
};

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
    auto candidate = [&](int64_t i) { return cell.candidate(i); };
    auto key = [&](int64_t i) { return cell.key(i); };
    using Selected = Cut<typename Cells<Real>::Key>;
    Selected cut{0, keep < count ? keep : INT_MAX};
    for (int shift = Selected::first_shift; keep < count && shift >= 0; shift -= 8) {
        count_digits(exec, shared.histogram, a.cells, cut, shift, candidate, key);
        cut = next_digit(exec, shared, shared.histogram, cut, shift);
    }
    keep_above(exec, shared, a.cells, cut, candidate, key, [&](int64_t i, int sum, auto before) {
        prefix[i] = sum;
        if (sum == 1 && before() == 0) shared.first = int(i);
    });
    exec.each([&](int t) {
        if (t == 0) {
            int* info = a.info + 4 * b;
            info[0] = keep, info[1] = shared.first, info[2] = bad ? -1 : wanted - keep, info[3] = forced;
        }
        if (b == 0 && a.sums) for (int i = t; i < kDigits; i += Exec::size) a.digits()[i] = 0;
    });
}

// Of the retained cells of the batch the `most` most probable stay, of equals the first: prefix and info once more.
template <class Real, class Grid>
HD void drop_least_probable(Grid& grid, const CountArgs& a, int most) {
    using Selected = Cut<typename Cells<Real>::Key>;
    Selected cut{0, most};
    int* digits = a.digits();
    for (int shift = Selected::first_shift; shift >= 0; shift -= 8, digits += 256) {
        grid.each(a.batch, [&](auto& exec, auto& shared, int b) {
            const Cells<Real> cell(a, b);
            count_digits(
                exec, shared.histogram, a.cells, cut, shift, [&](int64_t i) { return cell.retained(i); },
                [&](int64_t i) { return cell.key(i); });
            exec.each([&](int t) {
                for (int i = t; i < 256; i += exec.size)
                    if (shared.histogram[i]) exec.add(&digits[i], shared.histogram[i]);
            });
        });
        cut = grid.all([&](auto& exec, auto& shared) { return next_digit(exec, shared, digits, cut, shift); });
    }
    // info[3]: cells with the cut's key, then how many of them stay in this sample at most.
    grid.each(a.batch, [&](auto& exec, auto& shared, int b) {
        const Cells<Real> cell(a, b);
        exec.each([&](int t) { if (t == 0) shared.count = 0; });
        exec.each([&](int t) {
            int count = 0;
            for (int64_t i = t; i < a.cells; i += exec.size) count += cell.retained(i) & (cell.key(i) == cut.key);
            if (count) exec.add(&shared.count, count);
        });
        exec.each([&](int t) { if (t == 0) a.info[4 * b + 3] = shared.count; });
    });
    grid.each(1, [&](auto& exec, auto& shared, int) {
        scan(
            exec, shared, a.batch, [&](int64_t b) -> int64_t { return a.info[4 * b + 3]; },
            [&](int64_t b, int64_t sum) {
                const int64_t left = cut.equals - (sum - a.info[4 * b + 3]);
                a.info[4 * b + 3] = left > 0 ? int(left) : 0;
            });
    });
    grid.each(a.batch, [&](auto& exec, auto& shared, int b) {
        const Cells<Real> cell(a, b);
        int *info = a.info + 4 * b, *prefix = a.prefix + b * a.cells, *sums = a.sums + b * a.cells;
        keep_above(
            exec, shared, a.cells, Selected{cut.key, info[3]}, [&](int64_t i) { return cell.retained(i); },
            [&](int64_t i) { return cell.key(i); }, [&](int64_t i, int sum, auto) { sums[i] = sum; });
        exec.each([&](int t) {
            for (int64_t i = t; i < a.cells; i += exec.size) {
                prefix[i] = sums[i];
                if (sums[i] == 1 && (i == 0 || sums[i - 1] == 0)) info[1] = int(i);
                if (i == a.cells - 1) info[0] = sums[i];
            }
        });
    });
}

// Cells of the batch that count_sample retained, those that it had no room for, and whether its input or budget is bad.
struct Counted {
    int live, past;
    bool bad;
};

template <class Exec, class Block>
HD Counted count_batch(Exec& exec, Block& shared, const CountArgs& a) {
    exec.each([&](int t) { if (t == 0) shared.improper = shared.count = shared.forced = shared.live = 0; });
    exec.each([&](int t) {
        for (int b = t; b < a.batch; b += Exec::size) {
            const int* info = a.info + 4 * b;
            exec.add(&shared.live, info[0]);
            if (info[2] < 0) exec.max(&shared.improper, 1);
            if (info[2] > 0) exec.add(&shared.count, info[2]);
            if (a.budget >= 0) exec.add(&shared.forced, info[3]);
        }
    });
    return {shared.live, shared.count, shared.improper || (a.budget >= 0 && a.budget < shared.forced)};
}

// Where each sample's rows and refilled cells start, and the two integers the host waits for.
template <class Real, class Grid>
HD void place_samples(Grid& grid, const CountArgs& a) {
    const Counted counted = grid.all([&](auto& exec, auto& shared) { return count_batch(exec, shared, a); });
    int64_t wanted = int64_t(counted.live) + counted.past, most = a.capacity < 0 ? counted.live : a.capacity;
    if (a.budget >= 0 && a.budget < wanted) wanted = a.budget;
    if (a.budget >= 0 && a.budget < most) most = a.budget;
    if (most < counted.live) drop_least_probable<Real>(grid, a, int(most));
    grid.first([&](auto& exec, auto& shared) {
        exec.each([&](int t) { if (t == 0) shared.longest = a.cu_seqlens[0] = a.member_base[0] = 0; });
        const int64_t live = scan(
            exec, shared, a.batch,
            [&](int64_t b) {
                exec.max(&shared.longest, a.info[4 * b]);
                return int64_t(a.info[4 * b]);
            },
            [&](int64_t b, int64_t sum) { a.cu_seqlens[b + 1] = int(sum); });
        scan(
            exec, shared, a.batch,
            [&](int64_t b) {
                if (a.cu_seqlens[b + 1] == a.cu_seqlens[b]) return int64_t(0);
                return a.cells - (a.mode == kPrevious ? a.info[4 * b + 1] : 0);
            },
            [&](int64_t b, int64_t sum) { a.member_base[b + 1] = int(sum); });
        exec.each([&](int t) {
            if (t == 0) {
                *a.overflow = int(wanted - live);
                a.status[0] = counted.bad ? -1 : int(live);
                a.status[1] = shared.longest;
            }
        });
    });
}

}  // namespace dcdit
