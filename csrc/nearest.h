// The retained cell nearest to each cell of a grid: an exact feature transform, one axis after the other.
//
// After axis k a cell knows the best of the retained cells that differ from it in the axes up to k only: its raster
// index over these axes, -1 for none. Of equal distances the lowest raster index wins, everywhere.
#pragma once

#include "plan.h"

namespace dcdit {

// One line of an axis: what each of its places got from the axes before, and their squared distance.
struct Line {
    const int* from;
    int64_t start, stride;
    int n, axis, lead;       // lead: raster index of the line over the axes before
    int second;              // dim[1], which splits a raster index over two axes

    HD int at(int x) const { return from[start + x * stride]; }
    HD int64_t distance(int site) const {
        if (axis == 1) return int64_t(lead - site) * (lead - site);
        int64_t df = lead / second - site / second, dh = lead % second - site % second;
        return df * df + dh * dh;
    }
};

// Along the first axis: the nearest retained cell above or below. A thread per column.
template <class Exec, class Kept>
HD void sweep(Exec& exec, const FillArgs& a, Kept kept, int* site) {
    const int64_t columns = a.cells / a.dim[0];
    exec.each([&](int t) {
        for (int64_t c = t; c < columns; c += Exec::size) {
            int last = -1;
            for (int y = 0; y < a.dim[0]; ++y) {
                last = kept(y * columns + c) ? y : last;
                site[y * columns + c] = last;
            }
            last = -1;
            for (int y = a.dim[0] - 1; y >= 0; --y) {
                const int above = site[y * columns + c];
                last = above == y ? y : last;
                const bool below = (last >= 0) & ((above < 0) | (last - y < y - above));
                site[y * columns + c] = below ? last : above;
            }
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
            const int site = line.at(int(u));
            if (site < 0) continue;
            const int64_t distance = d * d + line.distance(site);
            const int raster = site * line.n + int(u);
            if (distance < least || (distance == least && raster < best)) least = distance, best = raster;
        }
    }
    return best;
}

// A parabola (x - u)² + height of the lower envelope, lowest from `begin` on.
struct Parabola {
    int64_t height;
    int u, begin, site;
};

// A whole line in linear time: the lower envelope of its parabolas (Felzenszwalb and Huttenlocher 2012), in integers.
// The tie rule is kept as if every height had its raster index as an infinitesimal.
template <class Store>
HD void envelope(const Line& line, Parabola* stack, Store store) {
    int top = -1;
    for (int u = 0; u < line.n; ++u) {
        const int site = line.at(u);
        if (site < 0) continue;
        Parabola next{line.distance(site), u, 0, site};
        while (top >= 0) {
            const Parabola& old = stack[top];
            const bool lower = site < old.site;  // u > old.u, so of equal sites the old one comes first
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
        store(x, top < 0 ? -1 : stack[top].site * line.n + stack[top].u);
    }
}

// Along another axis: from -> store(cell, raster index over the axes up to this one).
template <class Exec, class Store>
HD void pass(Exec& exec, const FillArgs& a, int axis, const int* from, Parabola* stack, Store store) {
    const int n = a.dim[axis];
    const int64_t stride = axis + 1 < a.axes ? a.dim[2] : 1, lines = a.cells / n;
    auto line = [&](int64_t i) {
        const int lead = int(i / stride);
        return Line{from, lead * n * stride + i % stride, stride, n, axis, lead, a.dim[1]};
    };
    if constexpr (Exec::size == 1) {
        for (int64_t i = 0; i < lines; ++i) {
            const Line own = line(i);
            envelope(own, stack, [&](int x, int raster) { store(own.start + x * stride, raster); });
        }
    } else {
        // A line is too little for a thread: each place looks for itself, which is short where many cells are kept.
        exec.each([&](int t) {
            for (int64_t i = t; i < a.cells; i += Exec::size) {
                const int64_t lead = i / (n * stride), x = i / stride % n;
                store(i, look_outwards(line(lead * stride + i % stride), int(x)));
            }
        });
    }
}

}  // namespace dcdit
