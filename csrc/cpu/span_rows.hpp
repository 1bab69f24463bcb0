#pragma once

#include "attention_rows.hpp"

// How span attention holds rows, and what they see of columns. Products are [rows, columns] with vectors over columns: rows
// are read entry by entry as they lie. The columns that a row sees are neighbours.
namespace mold::MOLD_LEVEL {

// Rows of numbers are `width` wide, and of sums `sum_width`; their products have `depth` numbers. most_tokens are whole
// packs, most_columns whole blocks.
struct Sizes {
    int64_t batch, kv_heads, group, length, head_dim, depth, width, sum_width, most_tokens, most_columns, key_words;
    bool few;  // rows, of the heads that share a key head
};

template <typename N>
inline Sizes sizes_of(const View& q, const View& k, const SpanPlan* plans, int64_t key_words) {
    constexpr int64_t vector = lanes<Sum<N>>;
    const int64_t head_dim = q.sizes[3];
    Sizes sizes{
        q.sizes[0], k.sizes[1], q.sizes[1] / k.sizes[1], k.sizes[2], head_dim, round_up(head_dim, pack<N>),
        round_up(head_dim, vector * pack<N>), round_up(head_dim, vector), 0, 0, key_words, true};
    for (int64_t b = 0; b < sizes.batch; ++b) {
        sizes.few = sizes.few && plans[b].rows() * sizes.group <= few_rows;
        sizes.most_columns = larger(sizes.most_columns, round_up(plans[b].column_count, block_columns));
        for (const Range& piece : plans[b].pieces) {
            sizes.most_tokens = larger(sizes.most_tokens, round_up(piece.end - piece.begin, pack<N>));
        }
    }
    return sizes;
}

// The key vectors of a block of columns: as a panel, or where that is null as rows at this distance.
template <typename N>
struct KeyBlock {
    const N *panel, *rows;
    int64_t row;
};

template <typename T>
struct Seen {
    Vector<T> probability, slope;  // slope: d score / d (scale product)
};

// What the rows of a piece see: of the columns those from `begin`, where a column block begins, to `columns`.
template <typename T>
struct Sight {
    using Integer = typename VectorOf<T>::Integer;
    // Of the columns, and the first and the last that each row sees; counted from the position of the piece's first row.
    Integer *tokens, *firsts, *lasts;
    T* scores;         // [rows, block_columns]
    T scale, softcap;  // softcap 0: none
    const Visibility* visibility;
    Ranges ranges;
    int64_t length, begin, columns, rows;

    Sight(Scratch& scratch, const Sizes& sizes, const Visibility& visibility)
        : tokens(scratch.take<Integer>(sizes.most_columns)),
          firsts(scratch.take<Integer>(sizes.most_tokens)),
          lasts(scratch.take<Integer>(sizes.most_tokens)),
          scores(scratch.take<T>(sizes.most_tokens * block_columns)),
          scale(static_cast<T>(visibility.scale)),
          softcap(static_cast<T>(visibility.softcap)),
          visibility(&visibility),
          ranges(visibility.ranges),
          length(sizes.length),
          begin(0),
          columns(0),
          rows(0) {}

    // The last key that a position sees.
    int64_t last(int64_t position) const { return visibility->causal ? position : ranges.end(position, length) - 1; }

    // The keys of columns are of_columns[0] and on.
    template <typename Columns>
    void look(const Columns& of_columns, int64_t count, int64_t example, const Range& piece) {
        const int64_t position = visibility->first_position(example) + piece.begin;
        rows = piece.end - piece.begin;
        for (int64_t r = 0; r < rows; ++r) {
            firsts[r] = static_cast<Integer>(ranges.start(position + r) - position);
            lasts[r] = static_cast<Integer>(last(position + r) - position);
        }
        for (columns = 0; columns < count && of_columns[columns] - position <= lasts[rows - 1]; ++columns) {
            tokens[columns] = static_cast<Integer>(of_columns[columns] - position);
        }
        for (int64_t n = columns; n < round_up(columns, block_columns); ++n) tokens[n] = INT32_MAX;
        begin = first_block(of_columns, count, example, piece.begin);
    }

    // Of the columns that `row` may see, the first of the first column block.
    template <typename Columns>
    int64_t first_block(const Columns& of_columns, int64_t count, int64_t example, int64_t row) const {
        const int64_t start = ranges.start(visibility->first_position(example) + row);
        int64_t n = 0;
        while (n < count && of_columns[n] < start) ++n;
        return n / block_columns * block_columns;
    }

    // The rows that see any column of the block at n, from a whole pack on.
    template <typename N>
    int64_t first_row(int64_t n) const {
        int64_t first = 0;
        while (first < rows && lasts[first] < tokens[n]) ++first;
        return first / pack<N> * pack<N>;
    }
    template <typename N>
    int64_t last_row(int64_t n) const {
        const Integer token = tokens[smaller(n + block_columns, columns) - 1];
        int64_t last = rows;
        while (last > 0 && firsts[last - 1] > token) --last;
        return larger(last, first_row<N>(n));
    }

    template <typename N>
    Range rows_seeing(int64_t n) const {
        return {first_row<N>(n), last_row<N>(n)};
    }

    // Products with the block's columns, in `scores`, of the rows of q that see any of these, which it returns.
    template <typename N>
    Range multiply_block(int64_t n, Matrix<N> q, const Sizes& sizes, const KeyBlock<N>& keys) {
        const auto [first, last] = rows_seeing<N>(n);
        const int64_t width = smaller(block_columns, round_up(columns - n, lanes<T>));
        if (first == last) return {first, last};
        const N* rows = q.data + first * q.row;
        T* products = scores + first * block_columns;
        if (keys.panel) {
            multiply<N>(
                last - first, width, sizes.depth, {rows, q.row, q.column}, keys.panel, block_columns, products,
                block_columns, false);
        } else {
            multiply_few<N>(
                last - first, width, sizes.width, rows, q.row, keys.rows, keys.row, products, block_columns);
        }
        return {first, last};
    }

    // Whether all these rows see the whole block.
    bool is_open(int64_t n, const Range& of_rows) const {
        const int64_t end = n + block_columns;
        return end <= columns && lasts[of_rows.begin] >= tokens[end - 1] && firsts[of_rows.end - 1] <= tokens[n];
    }

    // Adds what each row of `seen` has of the block's columns, by these products [rows, block_columns], to row targets[r] of
    // sums [rows, block_columns]. Row after row: sums are of few rows, or of one.
    void add_block(
        int64_t n, const Range& seen, const T* products, const T* lse, const int64_t* targets, T* sums) const {
        if (seen.begin == seen.end) return;
        if (is_open(n, seen)) {
            add_rows<false>(n, seen, products, lse, targets, sums);
        } else {
            add_rows<true>(n, seen, products, lse, targets, sums);
        }
    }

    template <bool hides>
    void add_rows(
        int64_t n, const Range& seen, const T* products, const T* lse, const int64_t* targets, T* sums) const {
        using Integers = typename VectorOf<T>::integers;
        constexpr int together = 4;
        for (int64_t r = seen.begin; r < seen.end; ++r) {
            const T* row = products + r * block_columns;
            T* target = sums + targets[r] * block_columns;
            for (int64_t c = 0; c < block_columns; c += together * lanes<T>) {
                Vector<T> probabilities[together];
                for (int j = 0; j < together; ++j) {
                    const Vector<T> product = load(row + c + j * lanes<T>);
                    probabilities[j] = product * scale - lse[r];
                    if (softcap > 0) {
                        probabilities[j] = hyperbolic_tangent<T>(product * (scale / softcap)) * softcap - lse[r];
                    }
                }
                exponentials<T, together>(probabilities);
                for (int j = 0; j < together; ++j) {
                    if constexpr (hides) {
                        Integers token;
                        std::memcpy(&token, tokens + n + c + j * lanes<T>, sizeof token);
                        const Integers hidden = (token > lasts[r]) | (token < firsts[r]);
                        probabilities[j] = hidden ? Vector<T>{} : probabilities[j];
                    }
                    T* total = target + c + j * lanes<T>;
                    store<T>(load(total) + probabilities[j], total);
                }
            }
        }
    }

    // Likewise with visit(c, seen) for each vector of columns, where seen(r) is what row r has of the columns from n + c
    // on: a probability of 0 where hidden.
    template <typename N, typename Visit>
    void visit_vectors(
        int64_t n, Matrix<N> q, const Sizes& sizes, const KeyBlock<N>& keys, const T* lse, const Visit& visit) {
        const Range seen = multiply_block(n, q, sizes, keys);
        if (seen.begin == seen.end) return;
        const int64_t width = smaller(block_columns, round_up(columns - n, lanes<T>));
        if (is_open(n, seen)) {
            visit_scores<false>(n, width, lse, visit);
        } else {
            visit_scores<true>(n, width, lse, visit);
        }
    }

    template <bool hides, typename Visit>
    void visit_scores(int64_t n, int64_t width, const T* lse, const Visit& visit) {
        using Integers = typename VectorOf<T>::integers;
        for (int64_t c = 0; c < width; c += lanes<T>) {
            Integers token;
            std::memcpy(&token, tokens + n + c, sizeof token);
            visit(c, [&](int64_t r) {
                const Vector<T> product = load(scores + r * block_columns + c);
                Vector<T> score = product * scale - lse[r], slope = splat<T>(1);
                if (softcap > 0) {
                    const Vector<T> tangent = hyperbolic_tangent<T>(product * (scale / softcap));
                    score = tangent * softcap - lse[r];
                    slope -= tangent * tangent;
                }
                Vector<T> probability = exponential<T>(score);
                if constexpr (hides) {
                    const Integers hidden = (token > lasts[r]) | (token < firsts[r]);
                    probability = hidden ? Vector<T>{} : probability;
                }
                return Seen<T>{probability, slope};
            });
        }
    }
};

// A piece's rows of one head of source [B, Hq, T, D]: as they lie where vectors can be read from them, else copied.
template <typename Element, typename N>
inline Matrix<N> rows_of(const View& source, int64_t example, int64_t head, const Range& piece, const Sizes& sizes, N* copy) {
    const Element* first = source.at<const Element>(example, head, piece.begin);
    if constexpr (std::is_same_v<Element, N>) {
        if (source.strides[3] == 1 && sizes.head_dim == sizes.width) return {first, source.strides[2], 1};
    }
    for (int64_t r = 0; r < piece.end - piece.begin; ++r) {
        load_row(first + r * source.strides[2], source.strides[3], sizes.head_dim, copy + r * sizes.width, sizes.width);
    }
    return {copy, sizes.width, 1};
}

// A piece's entries of one head of source [B, Hq, T].
template <typename T>
inline void load_entries(const View& source, int64_t example, int64_t head, const Range& piece, T* target) {
    for (int64_t t = piece.begin; t < piece.end; ++t) target[t - piece.begin] = *source.at<const T>(example, head, t);
}

// Keeps `value` where it is more than `best`, and where it is NaN, and from which row it is.
template <typename T, typename Row>
inline void keep_more(T value, Row row, T& best, std::int32_t& first) {
    const bool more = value > best || value != value;
    first = more ? static_cast<std::int32_t>(row) : first;
    best = more ? value : best;
}

}  // namespace mold::MOLD_LEVEL
