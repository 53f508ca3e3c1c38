// The chunk on the CPU, of float, double or bfloat16; sums are in Wide<T>. Rows are contiguous.
#pragma once

#include <cstdint>

namespace dcdit {

struct ChunkArgs {
    const int *token, *offsets, *member;  // of each row its cell or -1, and the cells that it refills
    int64_t rows, cells, features;        // cells of one sample
};

// out[r] = h[token[r]] + pos[its cell], 0 where there is none. pos may be null.
template <class T>
void chunk(const ChunkArgs&, const T* h, const T* pos, T* out, int threads);

// out[r] = the mean of h over the cells that row r refills + pos[its cell], 0 where there are none.
template <class T>
void chunk_mean(const ChunkArgs&, const T* h, const T* pos, T* out, int threads);

}  // namespace dcdit
