// The retained cell nearest to each cell of a grid: an exact feature transform, one axis after the other.
//
// After axis k a cell knows the best of the retained cells that differ from it in the axes up to k only, by a seed: a
// raster index over the axes up to k, -1 for none. Of equal distances the lowest raster index wins, everywhere.
#pragma once

#include "plan.h"

namespace dcdit {

// Words of bits for a column of n cells; no more than cells.
HD int mask_words(int n) { return (n + 31) / 32; }

// One line of an axis: the seed of each place, which is the best cell by the axes before, and its squared distance.
struct Line {
    const int* seeds;
    int64_t start, stride;
    int n, axis, prefix_index;  // prefix_index: the line's own raster index over the axes before
    int dim1;                   // splits a raster index over two axes

    HD int at(int x) const { return seeds[start + x * stride]; }
    HD int64_t distance(int seed) const {
        if (axis == 1) return int64_t(prefix_index - seed) * (prefix_index - seed);
        int64_t df = prefix_index / dim1 - seed / dim1, dh = prefix_index % dim1 - seed % dim1;
        return df * df + dh * dh;
    }
};

// Along the first axis: the nearest retained cell above or below, of equally near ones the upper. A column's retained
// cells are bits of its `words` of `mask`, so that each cell looks for itself: at its own word, then at further ones.
template <class Exec>
HD void nearest_in_columns(Exec& exec, const FillArgs& a, const unsigned* mask, int* seed) {
    const unsigned columns = unsigned(a.cells / a.dim[0]);
    const int words = mask_words(a.dim[0]);
    exec.each([&](int t) {
        for (int64_t i = t; i < a.cells; i += Exec::size) {
            const int y = int(unsigned(i) / columns);
            const unsigned* column = mask + int64_t(unsigned(i) % columns) * words;
            int word = y / 32;
            unsigned bits = column[word] & ~0u >> (31 - y % 32);
            while (!bits && word) bits = column[--word];
            const int above = bits ? 32 * word + highest_bit(bits) : -1;
            word = y / 32;
            bits = column[word] & ~0u << y % 32;
            while (!bits && word + 1 < words) bits = column[++word];
            const int below = bits ? 32 * word + lowest_bit(bits) : -1;
            seed[i] = (below >= 0) & ((above < 0) | (below - y < y - above)) ? below : above;
        }
    });
}

// One place of a line by looking outwards, until the line alone is further than the best.
HD int look_outwards(const Line& line, int x) {
    int best = -1;
    int64_t least = INT64_MAX;
    for (int64_t d = 0; d * d <= least && (d <= x || x + d < line.n); ++d) {
        for (int side = 0; side < 2; ++side) {
            const int64_t u = side ? x + d : x - d;
            if (u < 0 || u >= line.n) continue;
            const int seed = line.at(int(u));
            if (seed < 0) continue;
            const int64_t distance = d * d + line.distance(seed);
            const int raster = seed * line.n + int(u);
            if (distance < least || (distance == least && raster < best)) least = distance, best = raster;
        }
    }
    return best;
}

// A parabola (x - u)² + height of the lower envelope, lowest from `begin` on.
struct Parabola {
    int64_t height;
    int u, begin, seed;
};

// A whole line in linear time: the lower envelope of its parabolas (Felzenszwalb and Huttenlocher 2012), in integers.
// The tie rule is kept as if every height had its raster index as an infinitesimal.
template <class Store>
HD void envelope(const Line& line, Parabola* stack, Store store) {
    int top = -1;
    for (int u = 0; u < line.n; ++u) {
        const int seed = line.at(u);
        if (seed < 0) continue;
        Parabola next{line.distance(seed), u, 0, seed};
        while (top >= 0) {
            const Parabola& old = stack[top];
            const bool lower = seed < old.seed;  // u > old.u, so of equal seeds the old one comes first
            // From the first x on where next wins: 2x(u - old.u) >= gap, or > where the tie is the old one's.
            const int64_t gap = int64_t(u) * u - int64_t(old.u) * old.u + next.height - old.height;
            const int64_t twice = 2 * (int64_t(u) - old.u), least = gap + !lower;
            int64_t begin = 0;
            if (least > 0) {
                const int64_t top_up = least + twice - 1;
                begin = top_up >> 32 ? top_up / twice : int64_t(uint32_t(top_up) / uint32_t(twice));
            }
            if (begin > old.begin) {
                next.begin = int(begin < line.n ? begin : line.n);
                break;
            }
            --top;
        }
        if (next.begin < line.n) stack[++top] = next;
    }
    for (int x = line.n - 1; x >= 0; --x) {
        while (top > 0 && stack[top].begin > x) --top;
        store(x, top < 0 ? -1 : stack[top].seed * line.n + stack[top].u);
    }
}

// Along another axis: seeds -> store(cell, seed over the axes so far).
template <class Exec, class Store>
HD void pass(Exec& exec, const FillArgs& a, int axis, const int* seeds, Parabola* stack, Store store) {
    const unsigned n = a.dim[axis], stride = axis + 1 < a.axes ? a.dim[2] : 1, lines = unsigned(a.cells / n);
    auto line = [&](unsigned i) {
        const int prefix_index = int(i / stride);
        return Line{seeds, int64_t(prefix_index) * n * stride + i % stride, stride, int(n), axis, prefix_index, a.dim[1]};
    };
    if constexpr (Exec::size == 1) {
        for (unsigned i = 0; i < lines; ++i) {
            const Line own = line(i);
            envelope(own, stack, [&](int x, int raster) { store(own.start + x * own.stride, raster); });
        }
    } else {
        // A line is too little for a thread: each place looks for itself, which is short where many cells are kept.
        exec.each([&](int t) {
            for (int64_t i = t; i < a.cells; i += Exec::size) {
                const unsigned cell = unsigned(i), prefix_index = cell / (n * stride), x = cell / stride % n;
                store(i, look_outwards(line(prefix_index * stride + cell % stride), int(x)));
            }
        });
    }
}

}  // namespace dcdit
