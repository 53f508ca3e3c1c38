// The second half of a plan, one sample at a time: packed rows, who refills whom, and the inverse as CSR.
#pragma once

#include "nearest.h"

namespace dcdit {

// Ints of scratch for one block: sites of two axes, and a cursor per row or the parabolas of a line.
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
template <class Exec, class Block>
HD void invert(Exec& exec, Block& shared, const FillArgs& a, int b, int start, int length, int* cursor) {
    const int64_t offset = b * a.cells;
    const int* nearest = a.nearest + offset;
    exec.each([&](int t) {
        for (int r = t; r < length; r += Exec::size) cursor[r] = 0;
    });
    exec.each([&](int t) {
        for (int64_t i = t; i < a.cells; i += Exec::size) exec.add(&cursor[nearest[i] - start], 1);
    });
    const int base = a.member_base[b];
    scan(
        exec, shared, length, [&](int64_t r) -> int64_t { return cursor[r]; },
        [&](int64_t r, int64_t sum) { cursor[r] = a.member_offsets[start + r] = int(base + sum - cursor[r]); });
    if constexpr (Exec::size == 1) {
        for (int64_t i = 0; i < a.cells; ++i) a.member_index[cursor[nearest[i] - start]++] = int(offset + i);
    } else {
        // Line by line: within one the cells of a row are a run (the difference of two squared distances is linear
        // along it), so each cell's place is its row's cursor, less where the run begins, plus where the cell is.
        const int n = a.dim[a.axes - 1];
        auto begins = [&](int64_t i) { return i % n == 0 || nearest[i - 1] != nearest[i]; };
        auto ends = [&](int64_t i) { return i % n == n - 1 || nearest[i + 1] != nearest[i]; };
        for (int64_t line = -n; line < a.cells; line += n) {
            exec.each([&](int t) {
                for (int64_t x = t; x < n; x += Exec::size) {
                    const int64_t i = line + x, next = i + n;
                    if (i >= 0 && ends(i)) exec.add(&cursor[nearest[i] - start], int(x) + 1);
                    if (next < a.cells && begins(next)) exec.add(&cursor[nearest[next] - start], -int(x));
                }
            });
            exec.each([&](int t) {
                for (int64_t x = t; x < n && line + n < a.cells; x += Exec::size) {
                    const int64_t next = line + n + x;
                    a.member_index[cursor[nearest[next] - start] + x] = int(offset + next);
                }
            });
        }
    }
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
    exec.each([&](int t) {
        for (int64_t i = t; i < a.cells; i += Exec::size) {
            if (!kept(i)) continue;
            a.token_index[start + prefix[i] - 1] = int(offset + i);
            a.sample_index[start + prefix[i] - 1] = b;
        }
    });
    if (a.mode != kGrid) return fill_line(exec, a, b, start, length);

    Parabola* stack = nullptr;
    if constexpr (Exec::size == 1) {
        stack = reinterpret_cast<Parabola*>(scratch);
        scratch += a.cells * (sizeof(Parabola) / sizeof(int));
    }
    int *site = scratch, *cursor = site + a.cells, *second = cursor + a.cells;
    sweep(exec, a, kept, site);
    if (a.axes == 3) {
        pass(exec, a, 1, site, stack, [&](int64_t i, int raster) { second[i] = raster; });
        site = second;
    }
    pass(exec, a, a.axes - 1, site, stack,
         [&](int64_t i, int raster) { a.nearest[offset + i] = start + prefix[raster] - 1; });
    invert(exec, shared, a, b, start, length, cursor);
}

// What no sample writes: rows past the last live one, and the places of cells that no row refills.
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
