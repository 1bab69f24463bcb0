// A[b, s, m]: blocks of (64 key columns, one step) add up P over the step's rows and its heads, in registers; then one
// warp an entry adds up the columns of a key word. Every sum has one order: two runs agree in every bit.
//
// The query heads that share a key head are stacked into one list of rows, so a step of a few tokens still fills
// tensor-core tiles, and the key tile is read once for all of them. Reads q once a column tile (from L2), k once a
// step.

#include <cmath>

#include "span_attention.hpp"
#include "tile.cuh"

namespace mold::cuda {
namespace {

template <typename Element>
struct Forward {
    TileShape<Element> shape;
    Heads<const Element> q, k;
    const float* lse;
    Strides<3> lse_strides;
    const int2* row_spans;
    const int* columns;
    float* partial;
    float scale;
    int batch, kv_heads, group, tokens, steps, num_columns, splits;
};

template <typename Element>
__global__ void __launch_bounds__(tile_threads) forward_kernel(Forward<Element> p) {
    auto* keys = reinterpret_cast<Element*>(shared_memory());
    Element* queries = keys + tile_rows * p.shape.pitch;
    auto* row_lse = reinterpret_cast<float*>(queries + tile_rows * p.shape.pitch);
    int* row_token = reinterpret_cast<int*>(row_lse + tile_rows);
    int* row_head = row_token + tile_rows;
    float* warp_sums = reinterpret_cast<float*>(row_head + tile_rows);

    const int first = blockIdx.x * tile_rows, step = blockIdx.y;
    const int b = blockIdx.z / p.splits, split = blockIdx.z % p.splits;
    const int* columns = p.columns + static_cast<std::int64_t>(b) * p.num_columns + first;
    if (columns[0] == p.tokens) return;  // nothing but padding, which nobody reads

    int2 span = p.row_spans[static_cast<std::int64_t>(b) * p.steps + step];
    span.x = max(span.x, columns[0]);  // the rows before see none of these columns
    const int length = max(span.y - span.x, 0), rows = p.group * length;
    const Lane lane;
    float sums[score_tiles][2] = {};

    for (int kv_head = split; kv_head < p.kv_heads; kv_head += p.splits) {
        for (int start = 0; start < rows; start += tile_rows) {
            __syncthreads();
            if (start == 0) {
                load_tile(keys, p.shape, p.k, [&](int row) {
                    return columns[row] < p.tokens ? p.k.row(b, kv_head, columns[row]) : nullptr;
                });
            }
            if (threadIdx.x < tile_rows) {
                const int index = start + threadIdx.x, head = kv_head * p.group + index / length;
                const int token = span.x + index % length;
                const bool inside = index < rows;
                row_token[threadIdx.x] = inside ? token : -1;
                row_head[threadIdx.x] = head;
                row_lse[threadIdx.x] = inside ? p.lse[b * p.lse_strides.along[0] + head * p.lse_strides.along[1] +
                                                      token * p.lse_strides.along[2]]
                                              : 0;
            }
            __syncthreads();
            load_tile(queries, p.shape, p.q, [&](int row) {
                return row_token[row] >= 0 ? p.q.row(b, row_head[row], row_token[row]) : nullptr;
            });
            __syncthreads();

            float scores[score_tiles][4];
            multiply_transposed(scores, queries + lane.warp * 16 * p.shape.pitch, keys, p.shape);
#pragma unroll
            for (int entry = 0; entry < 4; ++entry) {
                const int row = lane.warp * 16 + lane.row(entry);
                const int token = row_token[row];
                const float lse = row_lse[row];
#pragma unroll
                for (int j = 0; j < score_tiles; ++j) {
                    const bool visible = columns[j * 8 + lane.column(entry)] <= token;
                    sums[j][entry % 2] += visible ? expf(p.scale * scores[j][entry] - lse) : 0;
                }
            }
        }
    }

#pragma unroll
    for (int j = 0; j < score_tiles; ++j) {
#pragma unroll
        for (int entry = 0; entry < 2; ++entry) {
            for (int mask = 4; mask < warp_size; mask *= 2) sums[j][entry] += shuffle_xor(sums[j][entry], mask);
            if (lane.group == 0) warp_sums[lane.warp * tile_rows + j * 8 + lane.column(entry)] = sums[j][entry];
        }
    }
    __syncthreads();
    if (threadIdx.x < tile_rows) {
        float sum = 0;
        for (int warp = 0; warp < tile_threads / warp_size; ++warp) sum += warp_sums[warp * tile_rows + threadIdx.x];
        const std::int64_t row = (static_cast<std::int64_t>(split) * p.batch + b) * p.steps + step;
        p.partial[row * p.num_columns + first + threadIdx.x] = sum;
    }
}

struct Pool {
    const float* partial;
    const int2 *row_spans, *key_columns;
    float* pooled;
    int batch, query_heads, steps, keys, num_columns, splits;
    bool mean;
};

__global__ void __launch_bounds__(tile_threads) pool_kernel(Pool p) {
    const int key = blockIdx.x * (tile_threads / warp_size) + threadIdx.x / warp_size;
    if (key >= p.keys) return;
    const std::int64_t b = blockIdx.z, row = b * p.steps + blockIdx.y;
    const int2 rows = p.row_spans[row], range = p.key_columns[b * p.keys + key];
    double sum = 0;  // the largest terms of all, and few: their rounding would show
    for (int split = 0; split < p.splits; ++split) {
        const float* partial = p.partial + (static_cast<std::int64_t>(split) * p.batch * p.steps + row) * p.num_columns;
        for (int n = range.x + threadIdx.x % warp_size; n < range.y; n += warp_size) sum += partial[n];
    }
    for (int mask = 1; mask < warp_size; mask *= 2) sum += shuffle_xor(sum, mask);
    const double count = p.mean ? max(rows.y - rows.x, 1) : 1;
    if (threadIdx.x % warp_size == 0) p.pooled[row * p.keys + key] = static_cast<float>(sum / (count * p.query_heads));
}

}  // namespace

void span_attention_forward(const std::string& dtype, const Tensor& q, const Tensor& k, const Tensor& lse,
                            const Tensor& row_spans, const Tensor& columns, const Tensor& key_columns, float scale,
                            bool mean, const Tensor& partial, const Tensor& pooled, Stream stream) {
    const int batch = q.size(0), steps = row_spans.size(1), num_columns = columns.size(1), splits = partial.size(0);
    dispatch_element(dtype, [&](auto element) {
        using Element = decltype(element);
        const TileShape<Element> shape(q.size(3));
        const Forward<Element> arguments{.shape = shape,
                                         .q = Heads<const Element>(q),
                                         .k = Heads<const Element>(k),
                                         .lse = lse.data<const float>(),
                                         .lse_strides = Strides<3>(lse),
                                         .row_spans = row_spans.data<const int2>(),
                                         .columns = columns.data<const int>(),
                                         .partial = partial.data<float>(),
                                         .scale = scale,
                                         .batch = batch,
                                         .kv_heads = k.size(1),
                                         .group = q.size(1) / k.size(1),
                                         .tokens = q.size(2),
                                         .steps = steps,
                                         .num_columns = num_columns,
                                         .splits = splits};
        // Both tiles; lse, token and head of each row; a sum a warp and column.
        const std::size_t shared = 2 * shape.bytes() + sizeof(float) * tile_rows * (3 + tile_threads / warp_size);
        launch("span_attention_forward", forward_kernel<Element>, dim3(num_columns / tile_rows, steps, batch * splits),
               tile_threads, shared, arguments, stream);
    });
    const int keys = key_columns.size(1);
    const Pool arguments{.partial = partial.data<const float>(),
                         .row_spans = row_spans.data<const int2>(),
                         .key_columns = key_columns.data<const int2>(),
                         .pooled = pooled.data<float>(),
                         .batch = batch,
                         .query_heads = q.size(1),
                         .steps = steps,
                         .keys = keys,
                         .num_columns = num_columns,
                         .splits = splits,
                         .mean = mean};
    constexpr int keys_a_block = tile_threads / warp_size;
    launch("span_attention_forward", pool_kernel, dim3((keys + keys_a_block - 1) / keys_a_block, steps, batch),
           tile_threads, 0, arguments, stream);
}

}  // namespace mold::cuda
