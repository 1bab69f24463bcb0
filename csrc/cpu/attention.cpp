#include "attention_rows.hpp"
#include "level_kernels.hpp"

// Flash attention whose backward takes the gradient of the log-sum-exp; formulas in mold_kernels/attention.py. A task is
// a block of rows, the last ones first: without a window they see the most columns. Nothing of size T is stored beside
// inputs and outputs. Five products a block and column block in the backward, two in the forward, each 2 rows columns D
// FLOPs; three and one where v is null and the log-sum-exp alone is wanted. Padding is neither read nor walked.
namespace mold::MOLD_LEVEL {
namespace {

// A block stacks the heads that share a key head: at most this many rows, at least one token.
constexpr int64_t block_rows = 192;

// Rows of numbers are `width` wide, and of sums `sum_width`; their products have `depth` numbers.
struct Sizes {
    int64_t batch, kv_heads, group, head_dim, depth, width, sum_width, tokens, rows, blocks;
};

template <typename N>
Sizes sizes_of(const View& q, const View& k) {
    constexpr int64_t vector = lanes<Sum<N>>;
    const int64_t group = q.sizes[1] / k.sizes[1], tokens = larger(1, block_rows / group), head_dim = q.sizes[3];
    return {
        q.sizes[0], k.sizes[1], group, head_dim, round_up(head_dim, pack<N>),
        round_up(head_dim, vector * pack<N>), round_up(head_dim, vector), tokens, round_up(tokens * group, vector),
        (q.sizes[2] + tokens - 1) / tokens};
}

// Tasks of one key head follow each other at this distance.
int64_t stride_of(const Sizes& sizes) { return sizes.batch * sizes.kv_heads; }

template <typename Element, typename N>
void load_columns(
    const View& source, const RowBlock& block, int64_t first, int64_t columns, const Sizes& sizes, N* target) {
    for (int64_t n = 0; n < columns; ++n) {
        const int64_t count = block.real.is_real(first + n) ? sizes.head_dim : 0;
        const Element* row = source.at<const Element>(block.example, block.kv_head, first + n);
        load_row(row, source.strides[3], count, target + n * sizes.width, sizes.width);
    }
}

// What is the same for all blocks.
template <typename T>
struct Sight {
    const Visibility* visibility;
    Ranges ranges;
    T scale, softcap;  // softcap 0: none
    int64_t rows, length;
    bool causal;

    RealTokens real_tokens(int64_t example) const {
        RealTokens real{nullptr, 0, 0, length};
        const View* mask = visibility->mask;
        if (!mask) return real;
        real.mask = mask->at<const bool>(example);
        real.stride = mask->strides[1];
        while (real.begin < real.end && !real.mask[real.begin * real.stride]) ++real.begin;
        if (real.begin == real.end) real.begin = real.end = 0;
        while (real.begin < real.end && !real.mask[(real.end - 1) * real.stride]) --real.end;
        return real;
    }

    RowBlock block_of_task(const Sizes& sizes, int64_t task) const {
        const int64_t index = sizes.blocks - 1 - task / stride_of(sizes), head = task % stride_of(sizes);
        const int64_t first = index * sizes.tokens, example = head / sizes.kv_heads;
        const int64_t position = first + visibility->first_position(example);
        const int64_t tokens = smaller(sizes.tokens, rows - first);
        return {example, head % sizes.kv_heads, sizes.group, first, position, tokens, real_tokens(example), causal};
    }

    // The columns that the block sees lie between these; the first one begins a column block.
    int64_t first_column(const RowBlock& block) const {
        return larger(ranges.start(block.position), block.real.begin) / block_columns * block_columns;
    }
    int64_t last_column(const RowBlock& block) const {
        if (!causal) return smaller(ranges.end(block.end() - 1, length), block.real.end);
        const bool padding = block.end() <= block.real.begin || block.position >= block.real.end;
        return padding ? 0 : smaller(block.end(), block.real.end);
    }

    // Whether a later row block sees the column block at n, which is then the one that begins its sums.
    bool seen_later(const RowBlock& block, int64_t n) const {
        if (block.first + block.tokens == rows || (causal && block.end() >= block.real.end)) return false;
        return ranges.start(block.end()) / block_columns * block_columns <= n;
    }

    // The first key whose position sees the column.
    int64_t first_seeing(int64_t token) const { return causal ? token : ranges.start(token); }

    // The rows that see any of the columns from n on, from a whole tile up to whole vectors.
    int64_t first_row(const RowBlock& block, int64_t n) const {
        return block.rows_before(first_seeing(n)) / tile_width<T> * tile_width<T>;
    }
    int64_t last_row(const RowBlock& block, int64_t n, int64_t columns) const {
        const int64_t end = ranges.end(n + columns - 1, block.end());
        return round_up(block.rows_before(causal ? smaller(end, block.real.end) : end), lanes<T>);
    }

    // Products of the rows from `first` to `last` with column `token`: -infinity where a row must not see it, and what
    // times the scale is the score elsewhere.
    void look(const RowBlock& block, int64_t token, int64_t first, int64_t last, T* products) const {
        if (softcap > 0) {
            const T inward = scale / softcap, outward = softcap / scale;
            for (int64_t r = first; r < last; r += lanes<T>) {
                store<T>(hyperbolic_tangent<T>(load(products + r) * inward) * outward, products + r);
            }
        }
        const int64_t seen = block.real.is_real(token) ? block.rows_before(first_seeing(token)) : last;
        hide(products, first, smaller(seen, last));
        if (ranges.ends) hide(products, larger(first, block.rows_before(ranges.ends[token])), last);
    }

    // Products of row r with the columns from n on become scores: -infinity where the row must not see one, and from
    // `columns` to `padded`.
    void look_at_row(
        const RowBlock& block, int64_t r, int64_t n, int64_t columns, int64_t padded, T* products) const {
        for (int64_t c = 0; c < padded; c += lanes<T>) {
            const Vector<T> product = load(products + c);
            store<T>(
                softcap > 0 ? hyperbolic_tangent<T>(product * (scale / softcap)) * softcap : product * scale,
                products + c);
        }
        const int64_t position = block.position + r / block.group;
        const int64_t begin = larger(ranges.start(position), block.real.begin) - n;
        const int64_t end = (causal ? position + 1 : ranges.end(position, length)) - n;
        hide(products, 0, smaller(begin, padded));
        hide(products, larger(0, smaller(end, columns)), padded);
        if (!block.real.mask) return;
        for (int64_t c = 0; c < columns; ++c) {
            if (!block.real.is_real(n + c)) products[c] = static_cast<T>(-HUGE_VAL);
        }
    }

    // d score / d (scale product), of what `look` has left of a product; 0 where hidden.
    Vector<T> slope(Vector<T> product) const {
        const Vector<T> tangent = product * (scale / softcap);
        return product == static_cast<T>(-HUGE_VAL) ? Vector<T>{} : 1 - tangent * tangent;
    }
};

template <typename T>
Sight<T> sight_of(const View& q, const View& k, const Visibility& visibility) {
    return {
        &visibility, Ranges(visibility.ranges), static_cast<T>(visibility.scale), static_cast<T>(visibility.softcap),
        q.sizes[2], k.sizes[2], visibility.causal};
}

template <typename Element, typename T>
void forward(
    const View& q, const View& k, const View* v, const Sight<T>& sight, const View* out, const View& lse,
    int threads) {
    using N = Number<Element, T>;
    const Sizes sizes = sizes_of<N>(q, k);

    struct Buffers {
        N *rows, *panels, *columns, *stacked, *probabilities;
        T *products, *out, *most, *total, *factor;
    };
    const auto make = [&](Scratch& scratch) {
        Buffers buffers{
            scratch.take<N>(sizes.rows * sizes.width),
            scratch.take<N>(round_up(sizes.rows, tile_width<T>) * sizes.depth),
            scratch.take<N>(block_columns * sizes.width),
            scratch.take<N>(block_columns * sizes.width),
            nullptr,
            scratch.take<T>(block_columns * sizes.rows),
            scratch.take<T>(sizes.rows * sizes.sum_width),
            scratch.take<T>(sizes.rows),
            scratch.take<T>(sizes.rows),
            scratch.take<T>(sizes.rows)};
        if constexpr (pack<N> == 1) {
            buffers.probabilities = buffers.products;
        } else {
            buffers.probabilities = scratch.take<N>(block_columns * sizes.rows);
        }
        return buffers;
    };
    parallel(threads, sizes.blocks * stride_of(sizes), make, [&](int64_t task, Buffers& buffers) {
        const RowBlock block = sight.block_of_task(sizes, task);
        const int64_t rows = round_up(block.rows(), lanes<T>), end = sight.last_column(block);
        load_rows<Element, T>(q, block, buffers.rows, sizes.width);
        transpose(buffers.rows, rows, sizes.depth, sizes.width, buffers.panels);
        for (int64_t i = 0; i < rows * sizes.sum_width; ++i) buffers.out[i] = 0;
        for (int64_t r = 0; r < rows; ++r) {
            buffers.most[r] = static_cast<T>(-HUGE_VAL);
            buffers.total[r] = 0;
        }

        for (int64_t n = sight.first_column(block); n < end; n += block_columns) {
            const int64_t columns = smaller(block_columns, end - n), last = sight.last_row(block, n, columns);
            const int64_t first = sight.first_row(block, n);
            const int64_t packed = round_up(columns, pack<N>);
            load_columns<Element>(k, block, n, columns, sizes, buffers.columns);
            multiply_panels(
                columns, sizes.depth, buffers.columns, sizes.width, buffers.panels, first, last, buffers.products,
                rows);
            for (int64_t i = 0; i < columns; ++i) {
                sight.look(block, n + i, first, last, buffers.products + i * rows);
            }
            for (int64_t i = columns; i < packed; ++i) hide(buffers.products + i * rows, first, last);
            for (int64_t r = first; r < last; r += lanes<T>) {
                const Vector<T> before = load(buffers.most + r);
                Vector<T> most = before;
                for (int64_t i = 0; i < packed; ++i) {
                    T* entry = buffers.products + i * rows + r;
                    const Vector<T> score = load(entry) * sight.scale;
                    store<T>(score, entry);
                    most = score > most ? score : most;
                }
                store<T>(most, buffers.most + r);
                // -infinity - 0 where a row has seen nothing yet: -infinity - -infinity would be NaN.
                const Vector<T> shift = most == static_cast<T>(-HUGE_VAL) ? Vector<T>{} : most;
                const Vector<T> factor = exponential<T>(before - shift);
                Vector<T> total = load(buffers.total + r) * factor;
                for (int64_t i = 0; i < packed; i += pack<N>) {
                    Vector<T> probabilities[pack<N>];
#pragma GCC unroll 2
                    for (int64_t e = 0; e < pack<N>; ++e) {
                        probabilities[e] = exponential<T>(load(buffers.products + (i + e) * rows + r) - shift);
                        total += probabilities[e];
                    }
                    store_numbers<N>(probabilities, nullptr, 0, buffers.probabilities + i * rows + r * pack<N>);
                }
                store<T>(total, buffers.total + r);
                store<T>(factor, buffers.factor + r);
            }
            if (!v) continue;
            for (int64_t r = first; r < last; ++r) {
                T* row = buffers.out + r * sizes.sum_width;
                for (int64_t d = 0; d < sizes.sum_width; d += lanes<T>) {
                    store<T>(load(row + d) * buffers.factor[r], row + d);
                }
            }
            load_columns<Element>(*v, block, n, columns, sizes, buffers.columns);
            const N* values = stack(buffers.columns, columns, sizes.width, sizes.sum_width, buffers.stacked);
            multiply<N>(
                last - first, sizes.sum_width, packed, {buffers.probabilities + first * pack<N>, pack<N>, rows}, values,
                sizes.sum_width, buffers.out + first * sizes.sum_width, sizes.sum_width, true);
        }

        for (int64_t r = 0; r < block.rows(); ++r) {
            const int64_t head = block.head(r), token = block.token(r);
            const T total = block.is_real(r) ? buffers.total[r] : T{0};
            if (out) {
                Element* target = out->at<Element>(block.example, head, token);
                const T factor = total > 0 ? 1 / total : total;  // NaN stays NaN
                store_row(buffers.out + r * sizes.sum_width, out->strides[3], sizes.head_dim, factor, target);
            }
            *lse.at<T>(block.example, head, token) =
                total == 0 ? static_cast<T>(HUGE_VAL) : buffers.most[r] + std::log(total);
        }
    });
}

// Keys that a task of few rows walks.
constexpr int64_t few_keys = 1024;

// The log-sum-exp of few rows: keys as they lie, and vectors over keys. A task is a share of a head's keys.
template <typename Element, typename T>
void forward_few(const View& q, const View& k, const Sight<T>& sight, const View& lse, int threads) {
    using N = Number<Element, T>;
    const Sizes sizes = sizes_of<N>(q, k);
    const int64_t tokens = q.sizes[2], rows = tokens * sizes.group, heads = stride_of(sizes);
    const int64_t shares = (sight.length + few_keys - 1) / few_keys;
    const bool plain = std::is_same_v<Element, N> && k.strides[3] == 1 && sizes.head_dim == sizes.width;
    const Memory memory(2 * heads * shares * rows * static_cast<int64_t>(sizeof(T)));
    T *most_of = reinterpret_cast<T*>(memory.data), *total_of = most_of + heads * shares * rows;
    const auto block_of_head = [&](int64_t head) {
        const int64_t example = head / sizes.kv_heads, position = sight.visibility->first_position(example);
        return RowBlock{
            example, head % sizes.kv_heads, sizes.group, 0, position, tokens, sight.real_tokens(example), sight.causal};
    };

    struct Buffers {
        N *q, *keys;
        T *scores, *most, *total;  // [rows, block_columns], [rows, lanes] twice
    };
    const auto make = [&](Scratch& scratch) {
        return Buffers{
            scratch.take<N>(round_up(rows, lanes<T>) * sizes.width), scratch.take<N>(block_columns * sizes.width),
            scratch.take<T>(rows * block_columns), scratch.take<T>(rows * lanes<T>), scratch.take<T>(rows * lanes<T>)};
    };
    parallel(threads, heads * shares, make, [&](int64_t task, Buffers& buffers) {
        const RowBlock block = block_of_head(task / shares);
        const int64_t share = task % shares * few_keys, end = smaller(share + few_keys, sight.last_column(block));
        load_rows<Element, T>(q, block, buffers.q, sizes.width);
        for (int64_t i = 0; i < rows * lanes<T>; ++i) {
            buffers.most[i] = static_cast<T>(-HUGE_VAL);
            buffers.total[i] = 0;
        }
        const int64_t begin = larger(sight.ranges.start(block.position), block.real.begin);
        for (int64_t n = larger(share, begin); n < end; n += block_columns) {
            const int64_t columns = smaller(block_columns, end - n), padded = round_up(columns, lanes<T>);
            if (plain && columns == padded) {
                const N* keys = k.at<const N>(block.example, block.kv_head, n);
                multiply_few<N>(
                    rows, padded, sizes.width, buffers.q, sizes.width, keys, k.strides[2], buffers.scores,
                    block_columns);
            } else {
                load_columns<Element>(k, block, n, columns, sizes, buffers.keys);
                for (int64_t i = columns * sizes.width; i < padded * sizes.width; ++i) buffers.keys[i] = N{};
                multiply_few<N>(
                    rows, padded, sizes.width, buffers.q, sizes.width, buffers.keys, sizes.width, buffers.scores,
                    block_columns);
            }
            for (int64_t r = 0; r < rows; ++r) {
                T *scores = buffers.scores + r * block_columns, *most = buffers.most + r * lanes<T>;
                const Vector<T> before = load(most);
                Vector<T> larger_one = before, total{};
                sight.look_at_row(block, r, n, columns, padded, scores);
                for (int64_t c = 0; c < padded; c += lanes<T>) {
                    const Vector<T> score = load(scores + c);
                    larger_one = score > larger_one ? score : larger_one;
                }
                // -infinity - -infinity would be NaN where a lane has seen nothing yet.
                const Vector<T> shift = larger_one == static_cast<T>(-HUGE_VAL) ? Vector<T>{} : larger_one;
                for (int64_t c = 0; c < padded; c += lanes<T>) total += exponential<T>(load(scores + c) - shift);
                total += load(buffers.total + r * lanes<T>) * exponential<T>(before - shift);
                store<T>(larger_one, most);
                store<T>(total, buffers.total + r * lanes<T>);
            }
        }
        for (int64_t r = 0; r < rows; ++r) {
            const Vector<T> of_lanes = load(buffers.most + r * lanes<T>);
            T most = static_cast<T>(-HUGE_VAL);
            for (int64_t lane = 0; lane < lanes<T>; ++lane) most = of_lanes[lane] > most ? of_lanes[lane] : most;
            const T shift = most == static_cast<T>(-HUGE_VAL) ? 0 : most;
            most_of[task * rows + r] = most;
            total_of[task * rows + r] =
                sum<T>(load(buffers.total + r * lanes<T>) * exponential<T>(of_lanes - shift));
        }
    });

    for (int64_t head = 0; head < heads; ++head) {
        const RowBlock block = block_of_head(head);
        for (int64_t r = 0; r < rows; ++r) {
            const T *mosts = most_of + head * shares * rows + r, *totals = total_of + head * shares * rows + r;
            T most = static_cast<T>(-HUGE_VAL), total = 0;
            for (int64_t i = 0; i < shares; ++i) most = mosts[i * rows] > most ? mosts[i * rows] : most;
            const T shift = most == static_cast<T>(-HUGE_VAL) ? 0 : most;
            for (int64_t i = 0; i < shares; ++i) total += totals[i * rows] * std::exp(mosts[i * rows] - shift);
            const bool sees = block.is_real(r) && total != 0;
            *lse.at<T>(block.example, block.head(r), block.token(r)) =
                sees ? most + std::log(total) : static_cast<T>(HUGE_VAL);
        }
    }
}

// <a, b> of rows of a tensor.
template <typename T, typename Element>
T row_product(const Element* a, int64_t a_stride, const Element* b, int64_t b_stride, int64_t count) {
    T total = 0;
    if (a_stride == 1 && b_stride == 1) {
#pragma omp simd reduction(+ : total)
        for (int64_t d = 0; d < count; ++d) total += widen(a[d]) * widen(b[d]);
    } else {
        for (int64_t d = 0; d < count; ++d) total += widen(a[d * a_stride]) * widen(b[d * b_stride]);
    }
    return total;
}

// Rows of [columns, sum_width] times a factor into a gradient's rows, or added to them where these have begun.
template <typename T>
void add_columns(
    const T* source, const RowBlock& block, int64_t first, int64_t columns, const Sizes& sizes, T factor, bool begun,
    const View& gradient) {
    for (int64_t n = 0; n < columns; ++n) {
        T* row = gradient.at<T>(block.example, block.kv_head, first + n);
        for (int64_t d = 0; d < sizes.head_dim; ++d) {
            const T value = factor * source[n * sizes.sum_width + d];
            row[d] = begun ? row[d] + value : value;
        }
    }
}

template <typename Element, typename T>
void backward(
    const View* grad_out, const View& grad_lse, const View& q, const View& k, const View* v, const Sight<T>& sight,
    const View* out, const View& lse, const View& dq, const View& dk, const View* dv, int threads) {
    using N = Number<Element, T>;
    const Sizes sizes = sizes_of<N>(q, k);
    const int64_t tasks = sizes.blocks * stride_of(sizes);
    Turns turns(tasks);

    // `weights` and `probabilities` have the columns' rows, `stacked_weights` has the columns stacked. With a pack of one
    // they take the place of the products that they are made of.
    struct Buffers {
        N *q, *grad, *stacked_q, *stacked_grad, *q_panels, *grad_panels, *keys, *stacked_keys, *values, *weights,
            *stacked_weights, *probabilities;
        T *products, *value_products, *lse, *delta, *dq, *dk, *dv;
    };
    const auto make = [&](Scratch& scratch) {
        const int64_t panels = round_up(sizes.rows, tile_width<T>) * sizes.depth, of_rows = sizes.rows * sizes.width;
        const int64_t products = block_columns * sizes.rows, of_columns = block_columns * sizes.width;
        Buffers buffers{};
        const auto stacked = [&](N* numbers, int64_t count) { return pack<N> == 1 ? numbers : scratch.take<N>(count); };
        buffers.q = scratch.take<N>(of_rows);
        buffers.grad = scratch.take<N>(of_rows);
        buffers.stacked_q = stacked(buffers.q, of_rows);
        buffers.stacked_grad = stacked(buffers.grad, of_rows);
        buffers.q_panels = scratch.take<N>(panels);
        buffers.grad_panels = scratch.take<N>(panels);
        buffers.keys = scratch.take<N>(of_columns);
        buffers.stacked_keys = stacked(buffers.keys, of_columns);
        buffers.values = scratch.take<N>(of_columns);
        buffers.products = scratch.take<T>(products);
        buffers.value_products = scratch.take<T>(products);
        if constexpr (pack<N> == 1) {
            buffers.weights = buffers.stacked_weights = buffers.value_products;
            buffers.probabilities = buffers.products;
        } else {
            buffers.weights = scratch.take<N>(products);
            buffers.stacked_weights = scratch.take<N>(products);
            buffers.probabilities = scratch.take<N>(products);
        }
        buffers.lse = scratch.take<T>(sizes.rows);
        buffers.delta = scratch.take<T>(sizes.rows);
        buffers.dq = scratch.take<T>(sizes.rows * sizes.sum_width);
        buffers.dk = scratch.take<T>(block_columns * sizes.sum_width);
        buffers.dv = scratch.take<T>(block_columns * sizes.sum_width);
        return buffers;
    };
    parallel(threads, tasks, make, [&](int64_t task, Buffers& buffers) {
        const RowBlock block = sight.block_of_task(sizes, task);
        const int64_t rows = round_up(block.rows(), lanes<T>), end = sight.last_column(block);
        load_rows<Element, T>(q, block, buffers.q, sizes.width);
        transpose(buffers.q, rows, sizes.depth, sizes.width, buffers.q_panels);
        stack(buffers.q, rows, sizes.width, sizes.sum_width, buffers.stacked_q);
        load_entries(grad_lse, block, T{0}, buffers.delta);
        for (int64_t r = 0; r < rows; ++r) buffers.delta[r] = -buffers.delta[r];
        if (v) {
            load_rows<Element, T>(*grad_out, block, buffers.grad, sizes.width);
            transpose(buffers.grad, rows, sizes.depth, sizes.width, buffers.grad_panels);
            stack(buffers.grad, rows, sizes.width, sizes.sum_width, buffers.stacked_grad);
            for (int64_t r = 0; r < block.rows(); ++r) {
                const int64_t head = block.head(r), token = block.token(r);
                if (!block.is_real(r)) continue;
                buffers.delta[r] += row_product<T>(
                    grad_out->at<const Element>(block.example, head, token), grad_out->strides[3],
                    out->at<const Element>(block.example, head, token), out->strides[3], sizes.head_dim);
            }
        }
        // Padded rows, and those of padding: exp(0 - infinity) = 0.
        load_entries(lse, block, static_cast<T>(HUGE_VAL), buffers.lse);
        for (int64_t i = 0; i < rows * sizes.sum_width; ++i) buffers.dq[i] = 0;

        for (int64_t n = sight.first_column(block); n < end; n += block_columns) {
            const int64_t columns = smaller(block_columns, end - n), chunk = n / block_columns;
            const int64_t first = sight.first_row(block, n);
            const int64_t last = sight.last_row(block, n, columns), seen = last - first;
            const int64_t packed = round_up(columns, pack<N>);
            load_columns<Element>(k, block, n, columns, sizes, buffers.keys);
            multiply_panels(
                columns, sizes.depth, buffers.keys, sizes.width, buffers.q_panels, first, last, buffers.products, rows);
            if (v) {
                load_columns<Element>(*v, block, n, columns, sizes, buffers.values);
                multiply_panels(
                    columns, sizes.depth, buffers.values, sizes.width, buffers.grad_panels, first, last,
                    buffers.value_products, rows);
            }
            for (int64_t i = 0; i < columns; ++i) {
                sight.look(block, n + i, first, last, buffers.products + i * rows);
            }
            for (int64_t i = columns; i < packed; ++i) {
                hide(buffers.products + i * rows, first, last);
                for (int64_t r = first; r < last; ++r) buffers.value_products[i * rows + r] = 0;
            }
            for (int64_t i = 0; i < packed; i += pack<N>) {
                for (int64_t r = first; r < last; r += lanes<T>) {
                    Vector<T> probabilities[pack<N>], weights[pack<N>];
#pragma GCC unroll 2
                    for (int64_t e = 0; e < pack<N>; ++e) {
                        const int64_t at = (i + e) * rows + r;
                        const Vector<T> product = load(buffers.products + at), delta = load(buffers.delta + r);
                        probabilities[e] = exponential<T>(product * sight.scale - load(buffers.lse + r));
                        weights[e] = probabilities[e] * (v ? load(buffers.value_products + at) - delta : -delta);
                        if (sight.softcap > 0) weights[e] *= sight.slope(product);
                    }
                    const int64_t at = i * rows + r, stacked = i * rows + r * pack<N>;
                    store_numbers<N>(weights, buffers.weights + at, rows, buffers.stacked_weights + stacked);
                    store_numbers<N>(probabilities, buffers.probabilities + at, rows, nullptr);
                }
            }
            stack(buffers.keys, columns, sizes.width, sizes.sum_width, buffers.stacked_keys);
            multiply<N>(
                seen, sizes.sum_width, packed, {buffers.stacked_weights + first * pack<N>, pack<N>, rows},
                buffers.stacked_keys, sizes.sum_width, buffers.dq + first * sizes.sum_width, sizes.sum_width, true);
            multiply<N>(
                columns, sizes.sum_width, seen, {buffers.weights + first, rows, 1},
                buffers.stacked_q + first * sizes.sum_width, sizes.sum_width, buffers.dk, sizes.sum_width, false);
            if (v) {
                multiply<N>(
                    columns, sizes.sum_width, seen, {buffers.probabilities + first, rows, 1},
                    buffers.stacked_grad + first * sizes.sum_width, sizes.sum_width, buffers.dv, sizes.sum_width, false);
            }
            const bool begun = sight.seen_later(block, n);
            if (begun) turns.wait(task - stride_of(sizes), chunk);
            add_columns(buffers.dk, block, n, columns, sizes, sight.scale, begun, dk);
            if (v) add_columns(buffers.dv, block, n, columns, sizes, T{1}, begun, *dv);
            turns.finish(task, chunk);
        }

        for (int64_t r = 0; r < block.rows(); ++r) {
            Element* target = dq.at<Element>(block.example, block.head(r), block.token(r));
            store_row(buffers.dq + r * sizes.sum_width, dq.strides[3], sizes.head_dim, sight.scale, target);
        }
    });
}

}  // namespace

void attention_with_lse_forward(
    const View& q, const View& k, const View* v, const Visibility& visibility, const View* out, const View& lse,
    int threads) {
    dispatch(q.dtype, [&](auto element, auto accumulator) {
        using T = decltype(accumulator);
        const Sight<T> sight = sight_of<T>(q, k, visibility);
        if (!v && q.sizes[2] * (q.sizes[1] / k.sizes[1]) <= few_rows) {
            forward_few<decltype(element), T>(q, k, sight, lse, threads);
        } else {
            forward<decltype(element), T>(q, k, v, sight, out, lse, threads);
        }
    });
}

void attention_with_lse_backward(
    const View* grad_out, const View& grad_lse, const View& q, const View& k, const View* v,
    const Visibility& visibility, const View* out, const View& lse, const View& dq, const View& dk, const View* dv,
    int threads) {
    dispatch(q.dtype, [&](auto element, auto accumulator) {
        using T = decltype(accumulator);
        const Sight<T> sight = sight_of<T>(q, k, visibility);
        backward<decltype(element), T>(grad_out, grad_lse, q, k, v, sight, out, lse, dq, dk, dv, threads);
    });
}

}  // namespace mold::MOLD_LEVEL
