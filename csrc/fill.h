// The second half of a plan, one sample at a time: packed rows, who refills whom, and the inverse as CSR.
#pragma once

#include "nearest.h"

namespace dcdit {

// Ints of scratch for one block: seeds by one axis and in 3D by two, column masks, then counts of rows; with a block of
// one the parabolas of a line as well.
inline constexpr int64_t scratch_ints(int64_t cells, int axes, int block) {
    const int64_t ints = (axes == 3 ? 3 : 2) * cells + (block == 1 ? cells * int64_t(sizeof(Parabola) / sizeof(int)) : 0);
    return ints + ints % 2;  // the next block's parabolas stay aligned
}

// Cells in raster order belong to rows in order ("1d", "previous"): the inverse is the cells themselves.
template <class Exec>
HD void fill_line(Exec& exec, const FillArgs& a, int b, int start, int length) {
    const int64_t offset = b * a.cells;
    const int* prefix = a.prefix + offset;
    const int* token = a.token_index + start;
    int* nearest = a.nearest + offset;
    exec.each([&](int t) {
        for (int64_t i = t; i < a.cells; i += Exec::size) {
            int row = (prefix[i] < length ? prefix[i] : length) - 1;
            if (a.mode == kLine && row + 1 < length) {
                if (row < 0 || token[row + 1] - (offset + i) < offset + i - token[row]) ++row;
            }
            nearest[i] = row < 0 ? -1 : start + row;
        }
    });
    const int64_t first = a.mode == kPrevious ? token[0] - offset : 0;
    exec.each([&](int t) {
        for (int64_t i = first + t; i < a.cells; i += Exec::size) {
            const int at = int(a.member_base[b] + i - first);
            a.member_index[at] = int(offset + i);
            if (i == first || nearest[i - 1] != nearest[i]) a.member_offsets[nearest[i]] = at;
        }
    });
}

// `nearest` of one sample inverted by counting; cells of a row stay in ascending order.
//
// Rows are shared out among gangs of Exec::lanes threads, and each gang walks over all cells in order, `lanes` cells at
// a time, and counts the cells of its own rows. No gang waits for another. Before a step of the walk
//   count[r] is the number of cells of row r that the walk has passed, and
//   rank[i] of a passed cell i is the number of cells of its row before it.
// So a cell's place is its row's first place and its rank. Three rows on a 3×6 grid, nearest and rank:
//   0 0 0 1 1 1    0 1 2 0 1 2
//   0 0 2 2 1 1    3 4 0 1 3 4    count 5, 6, 7
//   2 2 2 2 2 1    2 3 4 5 6 5
template <class Exec, class Block>
HD void invert(Exec& exec, Block& shared, const FillArgs& a, int b, int start, int length, int* rank, int* count) {
    const int64_t offset = b * a.cells;
    const int* nearest = a.nearest + offset;
    exec.each([&](int t) {
        for (int r = t; r < length; r += Exec::size) count[r] = 0;
    });
    exec.each([&](int t) {
        constexpr int gangs = Exec::size / Exec::lanes;
        const int lane = t % Exec::lanes;
        const int64_t gang = t / Exec::lanes;
        const int low = start + int(length * gang / gangs), high = start + int(length * (gang + 1) / gangs);
        int ahead = lane < a.cells ? nearest[lane] : -1;
        for (int64_t first = 0; first < a.cells; first += Exec::lanes) {
            const int64_t i = first + lane, next = i + Exec::lanes;
            const int row = ahead;
            ahead = next < a.cells ? nearest[next] : -1;
            const bool own = (low <= row) & (row < high);
            const int passed = exec.count_one_more(own, count, row - start);
            if (own) rank[i] = passed;
        }
    });
    const int base = a.member_base[b];
    scan(
        exec, shared, length, [&](int64_t r) -> int64_t { return count[r]; },
        [&](int64_t r, int64_t sum) { a.member_offsets[start + r] = int(base + sum - count[r]); });
    exec.each([&](int t) {
        for (int64_t i = t; i < a.cells; i += Exec::size)
            a.member_index[a.member_offsets[nearest[i]] + rank[i]] = int(offset + i);
    });
}

template <class Exec, class Block>
HD void fill_sample(Exec& exec, Block& shared, const FillArgs& a, int b, int* scratch) {
    const int64_t offset = b * a.cells;
    const int* prefix = a.prefix + offset;
    const int start = a.cu_seqlens[b], length = a.cu_seqlens[b + 1] - start;
    auto kept = [&](int64_t i) { return (prefix[i] > (i ? prefix[i - 1] : 0)) & (prefix[i] <= length); };
    if (length == 0) {
        exec.each([&](int t) {
            for (int64_t i = t; i < a.cells; i += Exec::size) a.nearest[offset + i] = -1;
        });
        return;
    }
    const bool grid = a.mode == kGrid;
    Parabola* stack = nullptr;
    if constexpr (Exec::size == 1) {
        stack = reinterpret_cast<Parabola*>(scratch);
        scratch += a.cells * (sizeof(Parabola) / sizeof(int));
    }
    int *seed = scratch, *count = seed + a.cells, *second_seed = count + a.cells;
    unsigned* mask = reinterpret_cast<unsigned*>(count);
    const unsigned columns = unsigned(a.cells / a.dim[0]);
    const int words = mask_words(a.dim[0]);
    if (grid) {
        exec.each([&](int t) {
            for (int64_t i = t; i < int64_t(columns) * words; i += Exec::size) mask[i] = 0;
        });
    }
    exec.each([&](int t) {
        for (int64_t i = t; i < a.cells; i += Exec::size) {
            if (!kept(i)) continue;
            a.token_index[start + prefix[i] - 1] = int(offset + i);
            a.sample_index[start + prefix[i] - 1] = b;
            const unsigned y = unsigned(i) / columns;
            if (grid) exec.set(&mask[int64_t(unsigned(i) % columns) * words + y / 32], 1u << y % 32);
        }
    });
    if (!grid) return fill_line(exec, a, b, start, length);

    nearest_in_columns(exec, a, mask, seed);
    if (a.axes == 3) {
        pass(exec, a, 1, seed, stack, [&](int64_t i, int raster) { second_seed[i] = raster; });
        seed = second_seed;
    }
    pass(exec, a, a.axes - 1, seed, stack,
         [&](int64_t i, int raster) { a.nearest[offset + i] = start + prefix[raster] - 1; });
    invert(exec, shared, a, b, start, length, seed, count);
}

// Places that no sample writes: rows past the last live one, and the members of no row.
template <class Exec>
HD void fill_tail(Exec& exec, const FillArgs& a, int block, int blocks) {
    const int64_t live = a.cu_seqlens[a.batch], members = a.member_base[a.batch];
    exec.each([&](int t) {
        const int64_t first = int64_t(block) * Exec::size + t, step = int64_t(blocks) * Exec::size;
        for (int64_t r = live + first; r < a.capacity; r += step) a.token_index[r] = a.sample_index[r] = -1;
        for (int64_t r = live + first; r <= a.capacity; r += step) a.member_offsets[r] = int(members);
        for (int64_t i = members + first; i < a.batch * a.cells; i += step) a.member_index[i] = -1;
    });
}

}  // namespace dcdit
