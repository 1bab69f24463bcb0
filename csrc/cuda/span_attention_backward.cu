// dq, dk and dlse of span attention, P recomputed. With g[s, n] = 1/Hq sum_m dA[s, m] C[m, n] of step s ("column_grad",
// 1 / rows of the step included) the weights are W[i, n] = P[i, n] sum_{s holds i} g[s, n]. One kernel has tiles of 64
// rows on its left and walks over the columns (dq, dlse); one has 64 columns on its left and walks over the rows (dk),
// so no output has two writers. Rows are cut into `splits` lists for dk where the columns alone are too few blocks;
// the last kernel adds those up and puts zeros where a token is no column. No atomics: two runs agree in every bit.
//
// Cost: 8 B Hq T N D FLOPs, a fourth of it for making P twice.

#include <cmath>

#include "span_attention.hpp"
#include "tile.cuh"

namespace mold::cuda {
namespace {

struct Touching {
    const int2* spans;
    int2* touching;
    int count, stride, offset;
};

// First and last span that holds any of a tile's 64 positions: an interval that is tight for sorted spans and merely
// includes more for others. Nothing: first > last.
__global__ void __launch_bounds__(warp_size) touching_kernel(Touching p) {
    const int start = blockIdx.x * tile_rows, b = blockIdx.y;
    int first = p.count, last = -1;
    for (int index = threadIdx.x; index < p.count; index += warp_size) {
        const int2 span = p.spans[static_cast<std::int64_t>(b) * p.count + index];
        if (span.x < span.y && span.x < start + tile_rows && span.y > start) {
            first = min(first, index);
            last = index;
        }
    }
    for (int mask = 1; mask < warp_size; mask *= 2) {
        first = min(first, shuffle_xor(first, mask));
        last = max(last, shuffle_xor(last, mask));
    }
    if (threadIdx.x == 0)
        p.touching[static_cast<std::int64_t>(b) * p.stride + p.offset + blockIdx.x] = int2{first, last};
}

struct ColumnGrad {
    const float* grad;
    const int2 *row_spans, *key_columns, *touching;
    float* column_grad;
    int query_heads, steps, keys, num_columns, touching_stride;
    bool mean;
};

__global__ void __launch_bounds__(tile_rows) column_grad_kernel(ColumnGrad p) {
    const std::int64_t b = blockIdx.z, row = b * p.steps + blockIdx.y;
    const int column = blockIdx.x * tile_rows + threadIdx.x;
    const int2 touching = p.touching[b * p.touching_stride + blockIdx.x], rows = p.row_spans[row];
    float sum = 0;
    for (int key = touching.x; key <= touching.y; ++key) {
        const int2 range = p.key_columns[b * p.keys + key];
        if (range.x <= column && column < range.y) sum += p.grad[row * p.keys + key];
    }
    const float count = p.mean ? max(rows.y - rows.x, 1) : 1;
    p.column_grad[row * p.num_columns + column] = sum / (count * p.query_heads);
}

template <typename Element>
struct Backward {
    TileShape<Element> shape;
    Heads<const Element> q, k;
    const float* lse;
    Strides<3> lse_strides;
    const int2 *row_spans, *touching;
    const int* columns;
    const float *column_grad, *unit;
    float scale;
    int batch, query_heads, kv_heads, tokens, steps, num_columns, row_tiles, touching_stride, splits;
    Heads<Element> dq;
    float *dlse, *partial;

    __device__ float lse_of(int b, int head, int token) const {
        return lse[b * lse_strides.along[0] + head * lse_strides.along[1] + token * lse_strides.along[2]];
    }
};

// dq and dlse of 64 rows of one query head.
template <typename Element, int tiles>
__global__ void __launch_bounds__(tile_threads) rows_kernel(Backward<Element> p) {
    auto* queries = reinterpret_cast<Element*>(shared_memory());
    Element* keys = queries + tile_rows * p.shape.pitch;
    auto* scratch = reinterpret_cast<float*>(keys + tile_rows * p.shape.pitch);

    const int start = blockIdx.x * tile_rows, head = blockIdx.y, b = blockIdx.z;
    const int kv_head = head / (p.query_heads / p.kv_heads);
    const Lane lane;
    Element* own_queries = queries + lane.warp * 16 * p.shape.pitch;
    const int2 touching = p.touching[static_cast<std::int64_t>(b) * p.touching_stride + blockIdx.x];
    const int2* spans = p.row_spans + static_cast<std::int64_t>(b) * p.steps;
    const int* columns = p.columns + static_cast<std::int64_t>(b) * p.num_columns;
    const float* column_grad = p.column_grad + static_cast<std::int64_t>(b) * p.steps * p.num_columns;

    float sum[tiles][4] = {}, dlse[2] = {}, lse[2];
    int token[2];
    for (int half = 0; half < 2; ++half) {
        token[half] = start + lane.warp * 16 + lane.row(2 * half);
        lse[half] = token[half] < p.tokens ? p.lse_of(b, head, token[half]) : INFINITY;
    }
    if (touching.x <= touching.y) {
        load_tile(queries, p.shape, p.q,
                  [&](int row) { return start + row < p.tokens ? p.q.row(b, head, start + row) : nullptr; });
        for (int first = 0; first < p.num_columns; first += tile_rows) {
            if (columns[first] >= min(start + tile_rows, p.tokens)) break;  // columns ascend: the rest is hidden
            __syncthreads();
            load_tile(keys, p.shape, p.k, [&](int row) {
                const int column = columns[first + row];
                return column < p.tokens ? p.k.row(b, kv_head, column) : nullptr;
            });
            __syncthreads();
            float weights[score_tiles][4];
            multiply_transposed(weights, own_queries, keys, p.shape);
#pragma unroll
            for (int j = 0; j < score_tiles; ++j) {
                const int column = first + j * 8 + lane.column(0);
                float gradient[4] = {};
#pragma unroll 1  // there are mostly one or two, and registers are short
                for (int step = touching.x; step <= touching.y; ++step) {
                    const int2 span = spans[step];
                    const float2 g = *reinterpret_cast<const float2*>(
                        column_grad + static_cast<std::int64_t>(step) * p.num_columns + column);
#pragma unroll
                    for (int entry = 0; entry < 4; ++entry) {
                        const bool held = span.x <= token[entry / 2] && token[entry / 2] < span.y;
                        gradient[entry] += held ? (entry % 2 ? g.y : g.x) : 0;
                    }
                }
#pragma unroll
                for (int entry = 0; entry < 4; ++entry) {
                    const bool visible = columns[column + entry % 2] <= token[entry / 2];
                    weights[j][entry] =
                        visible ? gradient[entry] * expf(p.scale * weights[j][entry] - lse[entry / 2]) : 0;
                    dlse[entry / 2] -= weights[j][entry];
                }
            }
            multiply_add(sum, weights, keys, p.shape, scratch);
        }
    }

    __syncthreads();  // the loop may have ended before its first barrier
    put_rows(own_queries, p.shape, sum, p.scale * *p.unit);
    __syncthreads();
    store_tile(queries, p.shape, p.dq,
               [&](int row) { return start + row < p.tokens ? p.dq.row(b, head, start + row) : nullptr; });
    for (int half = 0; half < 2; ++half) {
        for (int mask = 1; mask < 4; mask *= 2) dlse[half] += shuffle_xor(dlse[half], mask);
        if (lane.quad == 0 && token[half] < p.tokens) {
            const std::int64_t row = static_cast<std::int64_t>(b) * p.query_heads + head;
            p.dlse[row * p.tokens + token[half]] = dlse[half] * *p.unit;
        }
    }
}

// dk of 64 columns of one key head, from every `splits`-th (row tile, query head of the group).
template <typename Element, int tiles>
__global__ void __launch_bounds__(tile_threads) columns_kernel(Backward<Element> p) {
    auto* keys = reinterpret_cast<Element*>(shared_memory());
    Element* queries = keys + tile_rows * p.shape.pitch;
    auto* row_lse = reinterpret_cast<float*>(queries + tile_rows * p.shape.pitch);
    float* scratch = row_lse + tile_rows;

    const int first = blockIdx.x * tile_rows, kv_head = blockIdx.y;
    const int b = blockIdx.z / p.splits, split = blockIdx.z % p.splits, group = p.query_heads / p.kv_heads;
    const int2* touching = p.touching + static_cast<std::int64_t>(b) * p.touching_stride;
    const int2* spans = p.row_spans + static_cast<std::int64_t>(b) * p.steps;
    const int* columns = p.columns + static_cast<std::int64_t>(b) * p.num_columns + first;
    if (columns[0] == p.tokens) return;  // nothing but padding, which nobody reads

    const Lane lane;
    const int own = lane.warp * 16;
    const float* column_grad = p.column_grad + static_cast<std::int64_t>(b) * p.steps * p.num_columns + first + own;
    const int column[2] = {columns[own + lane.group], columns[own + lane.group + 8]};
    float sum[tiles][4] = {};
    load_tile(keys, p.shape, p.k,
              [&](int row) { return columns[row] < p.tokens ? p.k.row(b, kv_head, columns[row]) : nullptr; });
    for (int index = columns[0] / tile_rows * group + split; index < p.row_tiles * group; index += p.splits) {
        const int row_tile = index / group, start = row_tile * tile_rows, head = kv_head * group + index % group;
        const int2 steps = touching[row_tile];
        if (steps.x > steps.y) continue;
        __syncthreads();
        load_tile(queries, p.shape, p.q,
                  [&](int row) { return start + row < p.tokens ? p.q.row(b, head, start + row) : nullptr; });
        if (threadIdx.x < tile_rows) {
            const int token = start + threadIdx.x;
            row_lse[threadIdx.x] = token < p.tokens ? p.lse_of(b, head, token) : INFINITY;
        }
        __syncthreads();
        float weights[score_tiles][4];
        multiply_transposed(weights, keys + own * p.shape.pitch, queries, p.shape);
#pragma unroll
        for (int j = 0; j < score_tiles; ++j) {
            const int row = j * 8 + lane.column(0), token = start + row;
            float gradient[4] = {};
#pragma unroll 1
            for (int step = steps.x; step <= steps.y; ++step) {
                const int2 span = spans[step];
                const float* g = column_grad + static_cast<std::int64_t>(step) * p.num_columns + lane.group;
#pragma unroll
                for (int entry = 0; entry < 4; ++entry) {
                    const bool held = span.x <= token + entry % 2 && token + entry % 2 < span.y;
                    gradient[entry] += held ? g[entry / 2 * 8] : 0;
                }
            }
#pragma unroll
            for (int entry = 0; entry < 4; ++entry) {
                const bool visible = column[entry / 2] <= token + entry % 2;
                const float exponent = p.scale * weights[j][entry] - row_lse[row + entry % 2];
                weights[j][entry] = visible ? gradient[entry] * expf(exponent) : 0;
            }
        }
        multiply_add(sum, weights, queries, p.shape, scratch);
    }

    const std::int64_t part = (static_cast<std::int64_t>(split) * p.batch + b) * p.kv_heads + kv_head;
    float* rows = p.partial + (part * p.num_columns + first + own) * p.shape.depth;
#pragma unroll
    for (int d = 0; d < tiles; ++d) {
        if (d * 8 < p.shape.depth) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                *reinterpret_cast<float2*>(rows + lane.row(2 * half) * p.shape.depth + d * 8 + lane.column(0)) =
                    float2{sum[d][2 * half], sum[d][2 * half + 1]};
            }
        }
    }
}

template <typename Element>
struct Scatter {
    TileShape<Element> shape;
    const float *partial, *unit;
    const int* column_index;
    Heads<Element> dk;
    float scale;
    int batch, kv_heads, tokens, num_columns, splits;
};

template <typename Element>
__global__ void __launch_bounds__(tile_threads) scatter_kernel(Scatter<Element> p) {
    const int b = blockIdx.z, head = blockIdx.y;
    const int token = blockIdx.x * (tile_threads / warp_size) + threadIdx.x / warp_size;
    if (token >= p.tokens) return;
    const int column = p.column_index[static_cast<std::int64_t>(b) * p.tokens + token];
    Element* to = p.dk.row(b, head, token);
    for (int d = threadIdx.x % warp_size; d < p.shape.width; d += warp_size) {
        float sum = 0;
        for (int split = 0; column >= 0 && split < p.splits; ++split) {
            const std::int64_t part = (static_cast<std::int64_t>(split) * p.batch + b) * p.kv_heads + head;
            sum += p.partial[(part * p.num_columns + column) * p.shape.depth + d];
        }
        to[d * p.dk.strides.along[3]] = narrow<Element>(sum * p.scale * *p.unit);
    }
}

// Registers are what limits the blocks of a multiprocessor, and the accumulator of D columns is most of them.
template <typename Function>
void dispatch_width(int head_dim, Function function) {
    if (head_dim <= 64) return function(std::integral_constant<int, 8>{});
    if (head_dim <= 128) return function(std::integral_constant<int, 16>{});
    if (head_dim <= 256) return function(std::integral_constant<int, 32>{});
    throw std::invalid_argument("head dimension was " + std::to_string(head_dim) + ", must be at most 256");
}

}  // namespace

void span_attention_backward(const std::string& dtype, const Tensor& grad, const Tensor& unit, const Tensor& q,
                             const Tensor& k, const Tensor& lse, const Tensor& row_spans, const Tensor& columns,
                             const Tensor& key_columns, const Tensor& column_index, float scale, bool mean,
                             const Tensor& column_grad, const Tensor& touching, const Tensor& partial, const Tensor& dq,
                             const Tensor& dk, const Tensor& dlse, Stream stream) {
    const char* name = "span_attention_backward";
    const int batch = q.size(0), query_heads = q.size(1), tokens = q.size(2), kv_heads = k.size(1);
    const int steps = row_spans.size(1), keys = key_columns.size(1), num_columns = columns.size(1);
    const int row_tiles = (tokens + tile_rows - 1) / tile_rows, column_tiles = num_columns / tile_rows;
    const int touching_stride = touching.size(1), splits = partial.size(0);

    const Touching of_rows{.spans = row_spans.data<const int2>(),
                           .touching = touching.data<int2>(),
                           .count = steps,
                           .stride = touching_stride,
                           .offset = 0};
    launch(name, touching_kernel, dim3(row_tiles, batch), warp_size, 0, of_rows, stream);
    const Touching of_columns{.spans = key_columns.data<const int2>(),
                              .touching = touching.data<int2>(),
                              .count = keys,
                              .stride = touching_stride,
                              .offset = row_tiles};
    launch(name, touching_kernel, dim3(column_tiles, batch), warp_size, 0, of_columns, stream);

    const ColumnGrad column_arguments{.grad = grad.data<const float>(),
                                      .row_spans = row_spans.data<const int2>(),
                                      .key_columns = key_columns.data<const int2>(),
                                      .touching = touching.data<const int2>() + row_tiles,
                                      .column_grad = column_grad.data<float>(),
                                      .query_heads = query_heads,
                                      .steps = steps,
                                      .keys = keys,
                                      .num_columns = num_columns,
                                      .touching_stride = touching_stride,
                                      .mean = mean};
    launch(name, column_grad_kernel, dim3(column_tiles, steps, batch), tile_rows, 0, column_arguments, stream);

    dispatch_element(dtype, [&](auto element) {
        using Element = decltype(element);
        const TileShape<Element> shape(q.size(3));
        const Backward<Element> arguments{.shape = shape,
                                          .q = Heads<const Element>(q),
                                          .k = Heads<const Element>(k),
                                          .lse = lse.data<const float>(),
                                          .lse_strides = Strides<3>(lse),
                                          .row_spans = row_spans.data<const int2>(),
                                          .touching = touching.data<const int2>(),
                                          .columns = columns.data<const int>(),
                                          .column_grad = column_grad.data<const float>(),
                                          .unit = unit.data<const float>(),
                                          .scale = scale,
                                          .batch = batch,
                                          .query_heads = query_heads,
                                          .kv_heads = kv_heads,
                                          .tokens = tokens,
                                          .steps = steps,
                                          .num_columns = num_columns,
                                          .row_tiles = row_tiles,
                                          .touching_stride = touching_stride,
                                          .splits = splits,
                                          .dq = Heads<Element>(dq),
                                          .dlse = dlse.data<float>(),
                                          .partial = partial.data<float>()};
        const std::size_t shared = 2 * shape.bytes() + scratch_bytes<Element>();
        dispatch_width(q.size(3), [&](auto tiles) {
            constexpr int count = decltype(tiles)::value;
            launch(name, rows_kernel<Element, count>, dim3(row_tiles, query_heads, batch), tile_threads, shared,
                   arguments, stream);
            launch(name, columns_kernel<Element, count>, dim3(column_tiles, kv_heads, batch * splits), tile_threads,
                   shared + sizeof(float) * tile_rows, arguments, stream);
        });
        const Scatter<Element> scatter_arguments{.shape = shape,
                                                 .partial = partial.data<const float>(),
                                                 .unit = unit.data<const float>(),
                                                 .column_index = column_index.data<const int>(),
                                                 .dk = Heads<Element>(dk),
                                                 .scale = scale,
                                                 .batch = batch,
                                                 .kv_heads = kv_heads,
                                                 .tokens = tokens,
                                                 .num_columns = num_columns,
                                                 .splits = splits};
        constexpr int tokens_a_block = tile_threads / warp_size;
        launch(name, scatter_kernel<Element>, dim3((tokens + tokens_a_block - 1) / tokens_a_block, kv_heads, batch),
               tile_threads, 0, scatter_arguments, stream);
    });
}

}  // namespace mold::cuda
