#pragma once

#include "simd.hpp"

// How flash attention holds rows; span attention takes the functions that load, store and transpose some. The query
// heads of a group share a key head, so a block stacks them: row r is token r / group, head r % group. Products are laid
// out transposed, [columns, rows]: vectors then run over rows, sums over columns need no horizontal addition, and keys
// and values are used as they lie, each row broadcast entry by entry. The rows that see a column are neighbours:
// causality hides a prefix, a window or the end of a packed sequence hides a suffix.
namespace mold::MOLD_LEVEL {

// Columns that are multiplied at once: their products with a block's rows fit the L2 cache.
constexpr int64_t block_columns = 64;

struct RowBlock {
    int64_t example, kv_head, group, first_token, tokens;

    int64_t rows() const { return tokens * group; }
    // Rows of earlier tokens than `token`.
    int64_t rows_before(int64_t token) const { return smaller(larger(token - first_token, 0) * group, rows()); }
    int64_t head(int64_t row) const { return kv_head * group + row % group; }
    int64_t token(int64_t row) const { return first_token + row / group; }
};

// target[i] = source[i * stride] for i < count, zeros up to `width`.
template <typename Element, typename T>
inline void load_row(const Element* source, int64_t stride, int64_t count, T* target, int64_t width) {
    if (stride == 1) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) target[i] = widen(source[i]);
    } else {
        for (int64_t i = 0; i < count; ++i) target[i] = widen(source[i * stride]);
    }
    for (int64_t i = count; i < width; ++i) target[i] = 0;
}

// target[i * stride] = factor * source[i].
template <typename Element, typename T>
inline void store_row(const T* source, int64_t stride, int64_t count, T factor, Element* target) {
    if (stride == 1) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) target[i] = narrow<Element>(factor * source[i]);
    } else {
        for (int64_t i = 0; i < count; ++i) target[i * stride] = narrow<Element>(factor * source[i]);
    }
}

// The block's rows of source [B, Hq, T, D] as [padded rows, width] with zeros where padded.
template <typename Element, typename T>
inline void load_rows(const View& source, const RowBlock& block, T* target, int64_t width) {
    const int64_t rows = block.rows(), padded = round_up(rows, lanes<T>);
    for (int64_t r = 0; r < rows; ++r) {
        const Element* row = source.at<const Element>(block.example, block.head(r), block.token(r));
        load_row(row, source.strides[3], source.sizes[3], target + r * width, width);
    }
    for (int64_t i = rows * width; i < padded * width; ++i) target[i] = 0;
}

// The block's entries of source [B, Hq, T], and `padding` where padded.
template <typename T>
inline void load_entries(const View& source, const RowBlock& block, T padding, T* target) {
    const int64_t rows = block.rows();
    for (int64_t r = 0; r < rows; ++r) target[r] = *source.at<const T>(block.example, block.head(r), block.token(r));
    for (int64_t r = rows; r < round_up(rows, lanes<T>); ++r) target[r] = padding;
}

// Transposes [rows, width] into panels of `panel` rows, each [depth, panel]. rows and width are multiples of the lanes.
template <typename T, int64_t panel = tile_width<T>>
inline void transpose(const T* source, int64_t rows, int64_t depth, int64_t width, T* panels) {
    for (int64_t r = 0; r < rows; r += lanes<T>) {
        T* target = panels + r / panel * panel * depth + r % panel;
        for (int64_t d = 0; d < depth; d += lanes<T>) {
            Vector<T> square[lanes<T>];
#pragma GCC unroll 16
            for (int64_t i = 0; i < lanes<T>; ++i) square[i] = load(source + (r + i) * width + d);
            transpose_square<T>(square);
#pragma GCC unroll 16
            for (int64_t i = 0; i < lanes<T>; ++i) {
                if (d + i < depth) store(square[i], target + (d + i) * panel);
            }
        }
    }
}

// products[n, r] = <a[n, :], row r> for n < columns and first <= r < last; first is a multiple of tile_width.
template <typename T>
inline void multiply_panels(
    int64_t columns, int64_t depth, const T* a, int64_t a_row, const T* panels, int64_t first, int64_t last,
    T* products, int64_t products_row) {
    constexpr int64_t panel = tile_width<T>;
    for (int64_t r = first; r < last; r += panel) {
        multiply<T>(
            columns, smaller(panel, last - r), depth, {a, a_row, 1}, panels + r * depth, panel, products + r,
            products_row, false);
    }
}

template <typename T>
inline void hide(T* scores, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) scores[r] = static_cast<T>(-HUGE_VAL);
}

}  // namespace mold::MOLD_LEVEL
