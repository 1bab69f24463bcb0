#pragma once

#include "simd.hpp"
#include "span_pieces.hpp"

// How flash attention holds rows; span attention takes the functions that load, store and transpose some. The query
// heads of a group share a key head, so a block stacks them: row r is token r / group, head r % group. Products are laid
// out transposed, [columns, rows]: vectors then run over rows, sums over columns need no horizontal addition, and keys
// and values are used as they lie, each row broadcast entry by entry. The rows that see a column are neighbours:
// causality or the start of a packed sequence hides a prefix, a window or the sequence's end hides a suffix.
namespace mold::MOLD_LEVEL {

// An entry as a number that products are made of.
template <typename N, typename Element>
inline N number(Element value) {
    if constexpr (std::is_same_v<N, Element>) {
        return value;
    } else {
        return widen(value);
    }
}

// The tokens of an example that are no padding lie between `begin` and `end`; `is_real` says which of these are.
struct RealTokens {
    const bool* mask;
    int64_t stride, begin, end;

    bool is_real(int64_t token) const { return token >= begin && token < end && (!mask || mask[token * stride]); }
};

// Tokens of q from `first` on, which stand at the keys' tokens from `position` on.
struct RowBlock {
    int64_t example, kv_head, group, first, position, tokens;
    RealTokens real;
    bool causal;

    int64_t rows() const { return tokens * group; }
    int64_t end() const { return position + tokens; }
    // Rows at earlier positions than the key `token`.
    int64_t rows_before(int64_t token) const { return smaller(larger(token - position, 0), tokens) * group; }
    int64_t head(int64_t row) const { return kv_head * group + row % group; }
    int64_t token(int64_t row) const { return first + row / group; }
    // Rows are keys, and may be padding, where attention is causal.
    bool is_real(int64_t row) const { return !causal || real.is_real(position + row / group); }
};

// target[i] = source[i * stride] for i < count, zeros up to `width`.
template <typename Element, typename N>
inline void load_row(const Element* source, int64_t stride, int64_t count, N* target, int64_t width) {
    if (stride == 1) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) target[i] = number<N>(source[i]);
    } else {
        for (int64_t i = 0; i < count; ++i) target[i] = number<N>(source[i * stride]);
    }
    for (int64_t i = count; i < width; ++i) target[i] = N{};
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

// The block's rows of source [B, Hq, T, D] as [padded rows, width] with zeros where padded, and in rows of padding.
template <typename Element, typename T, typename N>
inline void load_rows(const View& source, const RowBlock& block, N* target, int64_t width) {
    const int64_t rows = block.rows(), padded = round_up(rows, lanes<T>);
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t count = block.is_real(r) ? source.sizes[3] : 0;
        const Element* row = source.at<const Element>(block.example, block.head(r), block.token(r));
        load_row(row, source.strides[3], count, target + r * width, width);
    }
    for (int64_t i = rows * width; i < padded * width; ++i) target[i] = N{};
}

// The block's entries of source [B, Hq, T], and `padding` in rows of padding and where padded.
template <typename T>
inline void load_entries(const View& source, const RowBlock& block, T padding, T* target) {
    const int64_t rows = block.rows();
    for (int64_t r = 0; r < rows; ++r) {
        target[r] = block.is_real(r) ? *source.at<const T>(block.example, block.head(r), block.token(r)) : padding;
    }
    for (int64_t r = rows; r < round_up(rows, lanes<T>); ++r) target[r] = padding;
}

// Stacks [rows, row] to [rows / pack, width, pack] in `stacked`, with zeros behind the last row; as it lies with a pack
// of one, which needs row == width.
template <typename N>
inline const N* stack(const N* source, int64_t rows, int64_t row, int64_t width, N* stacked) {
    if constexpr (pack<N> == 1) {
        return source;
    } else {
        for (int64_t r = 0; r < rows; r += 2) {
            const N *low = source + r * row, *high = r + 1 < rows ? low + row : low;
            const std::uint32_t kept = r + 1 < rows ? 0xffff0000 : 0;
#pragma omp simd
            for (int64_t i = 0; i < width; ++i) {
                const std::uint32_t upper = static_cast<std::uint32_t>(high[i]) << 16 & kept;
                const std::uint32_t word = static_cast<std::uint32_t>(low[i]) | upper;
                std::memcpy(stacked + r * width + 2 * i, &word, sizeof word);
            }
        }
        return stacked;
    }
}

// Transposes rows at the distance `row` into panels of `panel` rows, each stacked: [depth / pack, panel, pack]. rows is a
// multiple of the lanes, what can be read of each of the lanes' words, depth of the pack.
template <typename N, int64_t panel = tile_width<Sum<N>>>
inline void transpose(const N* source, int64_t rows, int64_t depth, int64_t row, N* panels) {
    constexpr int64_t side = lanes<Sum<N>>, words = side * pack<N>;
    for (int64_t r = 0; r < rows; r += side) {
        N* target = panels + r / panel * panel * depth + r % panel * pack<N>;
        for (int64_t d = 0; d < depth; d += words) {
            Vector<Sum<N>> square[side];
#pragma GCC unroll 16
            for (int64_t i = 0; i < side; ++i) square[i] = load_words(source + (r + i) * row + d);
            transpose_square<Sum<N>>(square);
#pragma GCC unroll 16
            for (int64_t i = 0; i < side; ++i) {
                const int64_t at = d + i * pack<N>;
                if (at < depth) std::memcpy(target + at * panel, &square[i], sizeof square[i]);
            }
        }
    }
}

// products[n, r] = <a[n, :], row r> for n < columns and first <= r < last; first is a multiple of tile_width.
template <typename N>
inline void multiply_panels(
    int64_t columns, int64_t depth, const N* a, int64_t a_row, const N* panels, int64_t first, int64_t last,
    Sum<N>* products, int64_t products_row) {
    constexpr int64_t panel = tile_width<Sum<N>>;
    for (int64_t r = first; r < last; r += panel) {
        multiply<N>(
            columns, smaller(panel, last - r), depth, {a, a_row, 1}, panels + r * depth, panel, products + r,
            products_row, false);
    }
}

template <typename T>
inline void hide(T* scores, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) scores[r] = static_cast<T>(-HUGE_VAL);
}

}  // namespace mold::MOLD_LEVEL
