#pragma once

// Tiles of 64 rows of q or k in shared memory, and the two products that span attention makes of them. A block has
// four warps; each owns 16 rows of the left tile. Scores of a warp, 16 x 64, lie in registers as the eight 16 x 8
// accumulators of mma.m16n8k16, whose layout is at once that of a left operand: P goes from the first product to the
// second without a detour. float32 runs on FMA in the same layout: three TF32 products a term come near its error only
// where tensor cores round their sums to nearest, which nothing promises (1.6 x the error, simulated with truncation).

#include "device.cuh"
#include "tensor.hpp"

namespace mold::cuda {

constexpr int tile_rows = 64;
constexpr int tile_threads = 128;
constexpr int score_tiles = tile_rows / 8;

// Rows of 16-bit elements are 16 bytes longer than a multiple of 32: eight successive ones touch every bank once.
template <typename Element>
struct TileShape {
    static constexpr int chunk = 16 / static_cast<int>(sizeof(Element));
    int width, depth, pitch;  // D, D rounded up to the 16 of a product (zeros beyond D), elements from row to row

    explicit TileShape(int head_dim) : width(head_dim), depth((head_dim + 15) / 16 * 16), pitch(depth + chunk) {}

    std::size_t bytes() const { return sizeof(Element) * tile_rows * pitch; }
};

// q, k and their gradients, [B, H, T, D].
template <typename Element>
struct Heads {
    Element* data;
    Strides<4> strides;
    bool chunked;  // every row can be read and written 16 bytes at a time

    explicit Heads(const Tensor& tensor) : data(tensor.data<Element>()), strides(tensor) {
        constexpr int chunk = TileShape<Element>::chunk;
        chunked = tensor.address % 16 == 0 && strides.along[3] == 1 && tensor.sizes[3] % chunk == 0;
        for (int axis = 0; axis < 3; ++axis) chunked = chunked && strides.along[axis] % chunk == 0;
    }

    __device__ Element* row(int batch, int head, int token) const {
        return data + batch * strides.along[0] + head * strides.along[1] + token * strides.along[2];
    }
};

// Fills a tile; row_of(0 .. 63) is the source of a row, or nullptr for zeros. The caller puts the barriers around it.
template <typename Element, typename RowOf>
__device__ void load_tile(Element* tile, TileShape<Element> shape, const Heads<const Element>& source, RowOf row_of) {
    const int step = source.chunked ? shape.chunk : 1;
    const int steps = shape.depth / step;
    for (int index = threadIdx.x; index < tile_rows * steps; index += tile_threads) {
        const int row = index / steps, column = index % steps * step;
        const Element* from = row_of(row);
        const bool inside = from != nullptr && column < shape.width;
        Element* to = tile + row * shape.pitch + column;
        if (source.chunked) {
            *reinterpret_cast<uint4*>(to) = inside ? *reinterpret_cast<const uint4*>(from + column) : uint4{0, 0, 0, 0};
        } else {
            *to = inside ? from[column * source.strides.along[3]] : Element{};
        }
    }
}

// The reverse, to rows that are not nullptr.
template <typename Element, typename RowOf>
__device__ void store_tile(const Element* tile, TileShape<Element> shape, const Heads<Element>& target, RowOf row_of) {
    const int step = target.chunked ? shape.chunk : 1;
    const int steps = shape.width / step;
    for (int index = threadIdx.x; index < tile_rows * steps; index += tile_threads) {
        const int row = index / steps, column = index % steps * step;
        Element* to = row_of(row);
        if (to == nullptr) continue;
        const Element* from = tile + row * shape.pitch + column;
        if (target.chunked) {
            *reinterpret_cast<uint4*>(to + column) = *reinterpret_cast<const uint4*>(from);
        } else {
            to[column * target.strides.along[3]] = *from;
        }
    }
}

// Where this thread's accumulators lie: entry e of tile j is in row row(e) of the warp's 16, column 8 j + column(e).
struct Lane {
    int warp = threadIdx.x / warp_size, group = threadIdx.x % warp_size / 4, quad = threadIdx.x % 4;

    __device__ int row(int entry) const { return group + entry / 2 * 8; }
    __device__ int column(int entry) const { return 2 * quad + entry % 2; }
};

// scores [16, 64] = left [16, D] right^T [D, 64]: left is the warp's own rows, right the whole tile.
template <typename Element>
__device__ void multiply_transposed(float (&scores)[score_tiles][4], const Element* left, const Element* right,
                                    TileShape<Element> shape) {
    const int lane = threadIdx.x % warp_size;
    for (auto& tile : scores) tile[0] = tile[1] = tile[2] = tile[3] = 0;
    // Four 8 x 8 matrices a lane address each: of the left operand they go down first, of the right one along k first.
    left += (lane % 8 + lane / 8 % 2 * 8) * shape.pitch + lane / 16 * 8;
    right += (lane % 8 + lane / 16 * 8) * shape.pitch + lane / 8 % 2 * 8;
    for (int k = 0; k < shape.depth; k += 16) {
        std::uint32_t a[4], b[4];
        load_matrices(a, left + k);
#pragma unroll
        for (int j = 0; j < score_tiles; j += 2) {
            load_matrices(b, right + j * 8 * shape.pitch + k);
            multiply(Element{}, scores[j], a, b);
            multiply(Element{}, scores[j + 1], a, b + 2);
        }
    }
}

__device__ inline void multiply_transposed(float (&scores)[score_tiles][4], const float* left, const float* right,
                                           TileShape<float> shape) {
    const Lane lane;
    for (auto& tile : scores) tile[0] = tile[1] = tile[2] = tile[3] = 0;
    for (int k = 0; k < shape.depth; k += 4) {
        float4 a[2];
        for (int half = 0; half < 2; ++half) {
            a[half] = *reinterpret_cast<const float4*>(left + lane.row(2 * half) * shape.pitch + k);
        }
#pragma unroll
        for (int j = 0; j < score_tiles; ++j) {
#pragma unroll
            for (int entry = 0; entry < 4; ++entry) {
                const float4 b =
                    *reinterpret_cast<const float4*>(right + (j * 8 + lane.column(entry)) * shape.pitch + k);
                const float4 x = a[entry / 2];
                scores[j][entry] += x.x * b.x + x.y * b.y + x.z * b.z + x.w * b.w;
            }
        }
    }
}

// sum [16, D] += weights [16, 64] right [64, D], for D up to 8 `tiles`. Only float32 uses `scratch`; the barriers around
// the loading of `right` keep two calls apart.
template <typename Element, int tiles>
__device__ void multiply_add(float (&sum)[tiles][4], const float (&weights)[score_tiles][4], const Element* right,
                             TileShape<Element> shape, float*) {
    const int lane = threadIdx.x % warp_size;
    right += (lane % 8 + lane / 8 % 2 * 8) * shape.pitch + lane / 16 * 8;
#pragma unroll
    for (int j = 0; j < score_tiles; j += 2) {
        const std::uint32_t a[4] = {pack(Element{}, weights[j][0], weights[j][1]),
                                    pack(Element{}, weights[j][2], weights[j][3]),
                                    pack(Element{}, weights[j + 1][0], weights[j + 1][1]),
                                    pack(Element{}, weights[j + 1][2], weights[j + 1][3])};
#pragma unroll
        for (int d = 0; d < tiles; d += 2) {
            if (d * 8 < shape.depth) {
                std::uint32_t b[4];
                load_transposed(b, right + j * 8 * shape.pitch + d * 8);
                multiply(Element{}, sum[d], a, b);
                multiply(Element{}, sum[d + 1], a, b + 2);
            }
        }
    }
}

constexpr int scratch_pitch = tile_rows + 4;

template <typename Element>
std::size_t scratch_bytes() {
    return sizeof(Element) == 4 ? sizeof(float) * tile_rows * scratch_pitch : 0;
}

template <int tiles>
__device__ void multiply_add(float (&sum)[tiles][4], const float (&weights)[score_tiles][4], const float* right,
                             TileShape<float> shape, float* scratch) {
    const Lane lane;
    scratch += lane.warp * 16 * scratch_pitch;
#pragma unroll
    for (int j = 0; j < score_tiles; ++j) {
#pragma unroll
        for (int entry = 0; entry < 4; ++entry) {
            scratch[lane.row(entry) * scratch_pitch + j * 8 + lane.column(entry)] = weights[j][entry];
        }
    }
    __syncwarp();
    for (int k = 0; k < tile_rows; ++k) {
        const float a[2] = {scratch[lane.group * scratch_pitch + k], scratch[(lane.group + 8) * scratch_pitch + k]};
#pragma unroll
        for (int d = 0; d < tiles; ++d) {
            if (d * 8 < shape.depth) {
                const float2 b = *reinterpret_cast<const float2*>(right + k * shape.pitch + d * 8 + lane.column(0));
                sum[d][0] += a[0] * b.x;
                sum[d][1] += a[0] * b.y;
                sum[d][2] += a[1] * b.x;
                sum[d][3] += a[1] * b.y;
            }
        }
    }
}

template <typename Element>
__device__ Element narrow(float value) {
    if constexpr (sizeof(Element) == 4) {
        return value;
    } else {
        return Element{static_cast<std::uint16_t>(pack(Element{}, value, 0))};
    }
}

// The warp's 16 rows of a tile from its accumulators.
template <typename Element, int tiles>
__device__ void put_rows(Element* rows, TileShape<Element> shape, const float (&sum)[tiles][4], float factor) {
    const Lane lane;
#pragma unroll
    for (int d = 0; d < tiles; ++d) {
        if (d * 8 < shape.depth) {
#pragma unroll
            for (int entry = 0; entry < 4; ++entry) {
                rows[lane.row(entry) * shape.pitch + d * 8 + lane.column(entry)] =
                    narrow<Element>(factor * sum[d][entry]);
            }
        }
    }
}

// Calls function(Element{}) for the type that torch calls `dtype`.
template <typename Function>
void dispatch_element(const std::string& dtype, Function function) {
    if (dtype == "bfloat16") return function(bfloat16{});
    if (dtype == "float16") return function(float16{});
    if (dtype == "float32") return function(float{});
    throw std::invalid_argument("dtype was " + dtype + ", must be bfloat16, float16 or float32");
}

}  // namespace mold::cuda
