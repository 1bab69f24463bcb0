#include "attention_rows.hpp"
#include "level_kernels.hpp"

// Flash attention whose backward takes the gradient of the log-sum-exp; formulas in mold_kernels/attention.py. A task is
// a block of rows, the last ones first: without a window they see the most columns. Nothing of size T is stored beside
// inputs and outputs. Five products a block and column block in the backward, two in the forward, each 2 rows columns D
// FLOPs; three and one where v is null and the log-sum-exp alone is wanted.
namespace mold::MOLD_LEVEL {
namespace {

// A block stacks the heads that share a key head: at most this many rows, at least one token.
constexpr int64_t block_rows = 192;

struct Sizes {
    int64_t batch, kv_heads, group, length, depth, width, tokens, rows, blocks;
};

template <typename T>
Sizes sizes_of(const View& q, const View& k) {
    const int64_t group = q.sizes[1] / k.sizes[1], tokens = larger(1, block_rows / group);
    return {
        q.sizes[0], k.sizes[1], group, q.sizes[2], q.sizes[3], round_up(q.sizes[3], lanes<T>), tokens,
        round_up(tokens * group, lanes<T>), (q.sizes[2] + tokens - 1) / tokens};
}

// Tasks of one key head follow each other at this distance.
int64_t stride_of(const Sizes& sizes) { return sizes.batch * sizes.kv_heads; }

RowBlock block_of_task(const Sizes& sizes, int64_t task) {
    const int64_t index = sizes.blocks - 1 - task / stride_of(sizes), head = task % stride_of(sizes);
    const int64_t first = index * sizes.tokens;
    return {head / sizes.kv_heads, head % sizes.kv_heads, sizes.group, first, smaller(sizes.tokens, sizes.length - first)};
}

template <typename Element, typename T>
void load_columns(
    const View& source, const RowBlock& block, int64_t first, int64_t columns, const Sizes& sizes, T* target) {
    for (int64_t n = 0; n < columns; ++n) {
        const Element* row = source.at<const Element>(block.example, block.kv_head, first + n);
        load_row(row, source.strides[3], sizes.depth, target + n * sizes.width, sizes.width);
    }
}

// What is the same for all blocks.
template <typename T>
struct Sight {
    const View* mask;
    Ranges ranges;
    T scale, softcap;  // softcap 0: none
    int64_t length;

    // Of the columns that the block sees, the first of the first column block.
    int64_t first_column(const RowBlock& block) const {
        return ranges.start(block.first_token) / block_columns * block_columns;
    }

    // Whether a later row block sees the column block at n, which is then the one that begins its sums.
    bool seen_later(const RowBlock& block, int64_t n) const {
        const int64_t next = block.first_token + block.tokens;
        return next < length && ranges.start(next) / block_columns * block_columns <= n;
    }

    // Behind the last row that sees any of the columns from n on, up to whole vectors.
    int64_t last_row(const RowBlock& block, int64_t n, int64_t columns) const {
        return round_up(block.rows_before(ranges.end(n + columns - 1, length)), lanes<T>);
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
        const bool padding = mask && !mask->at<const bool>(block.example)[token * mask->strides[1]];
        hide(products, first, padding ? last : smaller(block.rows_before(token), last));
        if (ranges.ends) hide(products, larger(first, block.rows_before(ranges.ends[token])), last);
    }

    // d score / d (scale product), of what `look` has left of a product; 0 where hidden.
    Vector<T> slope(Vector<T> product) const {
        const Vector<T> tangent = product * (scale / softcap);
        return product == static_cast<T>(-HUGE_VAL) ? Vector<T>{} : 1 - tangent * tangent;
    }
};

template <typename T>
Sight<T> sight_of(const View& q, const Visibility& visibility) {
    return {
        visibility.mask, Ranges(visibility.ranges), static_cast<T>(visibility.scale),
        static_cast<T>(visibility.softcap), q.sizes[2]};
}

template <typename Element, typename T>
void forward(
    const View& q, const View& k, const View* v, const Sight<T>& sight, const View* out, const View& lse,
    int threads) {
    const Sizes sizes = sizes_of<T>(q, k);

    struct Buffers {
        T *panels, *products, *columns, *out, *most, *total, *factor;
    };
    const auto make = [&](Scratch& scratch) {
        return Buffers{
            scratch.take<T>(round_up(sizes.rows, tile_width<T>) * sizes.depth),
            scratch.take<T>(block_columns * sizes.rows),
            scratch.take<T>(block_columns * sizes.width),
            scratch.take<T>(sizes.rows * sizes.width),
            scratch.take<T>(sizes.rows),
            scratch.take<T>(sizes.rows),
            scratch.take<T>(sizes.rows)};
    };
    parallel(threads, sizes.blocks * stride_of(sizes), make, [&](int64_t task, Buffers& buffers) {
        const RowBlock block = block_of_task(sizes, task);
        const int64_t rows = round_up(block.rows(), lanes<T>), end = block.first_token + block.tokens;
        load_rows<Element>(q, block, buffers.out, sizes.width);
        transpose(buffers.out, rows, sizes.depth, sizes.width, buffers.panels);
        for (int64_t i = 0; i < rows * sizes.width; ++i) buffers.out[i] = 0;
        for (int64_t r = 0; r < rows; ++r) {
            buffers.most[r] = static_cast<T>(-HUGE_VAL);
            buffers.total[r] = 0;
        }

        for (int64_t n = sight.first_column(block); n < end; n += block_columns) {
            const int64_t columns = smaller(block_columns, end - n), last = sight.last_row(block, n, columns);
            const int64_t first = block.rows_before(n) / tile_width<T> * tile_width<T>;
            load_columns<Element>(k, block, n, columns, sizes, buffers.columns);
            multiply_panels(
                columns, sizes.depth, buffers.columns, sizes.width, buffers.panels, first, last, buffers.products,
                rows);
            for (int64_t i = 0; i < columns; ++i) {
                sight.look(block, n + i, first, last, buffers.products + i * rows);
            }
            for (int64_t r = first; r < last; r += lanes<T>) {
                const Vector<T> before = load(buffers.most + r);
                Vector<T> most = before;
                for (int64_t i = 0; i < columns; ++i) {
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
                for (int64_t i = 0; i < columns; ++i) {
                    T* entry = buffers.products + i * rows + r;
                    const Vector<T> probability = exponential<T>(load(entry) - shift);
                    store<T>(probability, entry);
                    total += probability;
                }
                store<T>(total, buffers.total + r);
                store<T>(factor, buffers.factor + r);
            }
            if (!v) continue;
            for (int64_t r = first; r < last; ++r) {
                T* row = buffers.out + r * sizes.width;
                for (int64_t d = 0; d < sizes.width; d += lanes<T>) store<T>(load(row + d) * buffers.factor[r], row + d);
            }
            load_columns<Element>(*v, block, n, columns, sizes, buffers.columns);
            multiply<T>(
                last - first, sizes.width, columns, {buffers.products + first, 1, rows}, buffers.columns, sizes.width,
                buffers.out + first * sizes.width, sizes.width, true);
        }

        for (int64_t r = 0; r < block.rows(); ++r) {
            const T total = buffers.total[r];
            const int64_t head = block.head(r), token = block.token(r);
            if (out) {
                Element* target = out->at<Element>(block.example, head, token);
                const T factor = total > 0 ? 1 / total : total;  // NaN stays NaN
                store_row(buffers.out + r * sizes.width, out->strides[3], sizes.depth, factor, target);
            }
            *lse.at<T>(block.example, head, token) =
                total == 0 ? static_cast<T>(HUGE_VAL) : buffers.most[r] + std::log(total);
        }
    });
}

template <typename T>
T row_product(const T* a, const T* b, int64_t width) {
    Vector<T> total{};
    for (int64_t d = 0; d < width; d += lanes<T>) total += load(a + d) * load(b + d);
    return sum<T>(total);
}

// Rows of [columns, width] times a factor into a gradient's rows, or added to them where these have begun.
template <typename T>
void add_columns(
    const T* source, const RowBlock& block, int64_t first, int64_t columns, const Sizes& sizes, T factor, bool begun,
    const View& gradient) {
    for (int64_t n = 0; n < columns; ++n) {
        T* row = gradient.at<T>(block.example, block.kv_head, first + n);
        for (int64_t d = 0; d < sizes.depth; ++d) {
            const T value = factor * source[n * sizes.width + d];
            row[d] = begun ? row[d] + value : value;
        }
    }
}

template <typename Element, typename T>
void backward(
    const View* grad_out, const View& grad_lse, const View& q, const View& k, const View* v, const Sight<T>& sight,
    const View* out, const View& lse, const View& dq, const View& dk, const View* dv, int threads) {
    const Sizes sizes = sizes_of<T>(q, k);
    const int64_t tasks = sizes.blocks * stride_of(sizes);
    Turns turns(tasks);

    struct Buffers {
        T *q, *grad, *dq, *q_panels, *grad_panels, *lse, *delta, *probabilities, *weights, *keys, *values, *dk, *dv;
    };
    const auto make = [&](Scratch& scratch) {
        const int64_t panels = round_up(sizes.rows, tile_width<T>) * sizes.depth, of_rows = sizes.rows * sizes.width;
        const int64_t products = block_columns * sizes.rows, of_columns = block_columns * sizes.width;
        return Buffers{
            scratch.take<T>(of_rows),    scratch.take<T>(of_rows),    scratch.take<T>(of_rows),
            scratch.take<T>(panels),     scratch.take<T>(panels),     scratch.take<T>(sizes.rows),
            scratch.take<T>(sizes.rows), scratch.take<T>(products),   scratch.take<T>(products),
            scratch.take<T>(of_columns), scratch.take<T>(of_columns), scratch.take<T>(of_columns),
            scratch.take<T>(of_columns)};
    };
    parallel(threads, tasks, make, [&](int64_t task, Buffers& buffers) {
        const RowBlock block = block_of_task(sizes, task);
        const int64_t rows = round_up(block.rows(), lanes<T>), end = block.first_token + block.tokens;
        load_rows<Element>(q, block, buffers.q, sizes.width);
        transpose(buffers.q, rows, sizes.depth, sizes.width, buffers.q_panels);
        load_entries(grad_lse, block, T{0}, buffers.delta);
        if (v) {
            load_rows<Element>(*grad_out, block, buffers.grad, sizes.width);
            transpose(buffers.grad, rows, sizes.depth, sizes.width, buffers.grad_panels);
            load_rows<Element>(*out, block, buffers.dq, sizes.width);
        }
        for (int64_t r = 0; r < rows; ++r) {
            const T* at = buffers.grad + r * sizes.width;
            buffers.delta[r] = (v ? row_product(at, buffers.dq + r * sizes.width, sizes.width) : T{0}) - buffers.delta[r];
        }
        load_entries(lse, block, static_cast<T>(HUGE_VAL), buffers.lse);  // padded rows: exp(0 - infinity) = 0
        for (int64_t i = 0; i < rows * sizes.width; ++i) buffers.dq[i] = 0;

        for (int64_t n = sight.first_column(block); n < end; n += block_columns) {
            const int64_t columns = smaller(block_columns, end - n), chunk = n / block_columns;
            const int64_t first = block.rows_before(n) / tile_width<T> * tile_width<T>;
            const int64_t last = sight.last_row(block, n, columns), seen = last - first;
            load_columns<Element>(k, block, n, columns, sizes, buffers.keys);
            multiply_panels(
                columns, sizes.depth, buffers.keys, sizes.width, buffers.q_panels, first, last, buffers.probabilities,
                rows);
            if (v) {
                load_columns<Element>(*v, block, n, columns, sizes, buffers.values);
                multiply_panels(
                    columns, sizes.depth, buffers.values, sizes.width, buffers.grad_panels, first, last,
                    buffers.weights, rows);
            }
            for (int64_t i = 0; i < columns; ++i) {
                T *probabilities = buffers.probabilities + i * rows, *weights = buffers.weights + i * rows;
                sight.look(block, n + i, first, last, probabilities);
                for (int64_t r = first; r < last; r += lanes<T>) {
                    const Vector<T> product = load(probabilities + r), delta = load(buffers.delta + r);
                    const Vector<T> probability = exponential<T>(product * sight.scale - load(buffers.lse + r));
                    Vector<T> weight = probability * (v ? load(weights + r) - delta : -delta);
                    if (sight.softcap > 0) weight *= sight.slope(product);
                    store<T>(probability, probabilities + r);
                    store<T>(weight, weights + r);
                }
            }
            const T *probabilities = buffers.probabilities + first, *weights = buffers.weights + first;
            multiply<T>(
                seen, sizes.width, columns, {weights, 1, rows}, buffers.keys, sizes.width,
                buffers.dq + first * sizes.width, sizes.width, true);
            multiply<T>(
                columns, sizes.width, seen, {weights, rows, 1}, buffers.q + first * sizes.width, sizes.width,
                buffers.dk, sizes.width, false);
            if (v) {
                multiply<T>(
                    columns, sizes.width, seen, {probabilities, rows, 1}, buffers.grad + first * sizes.width,
                    sizes.width, buffers.dv, sizes.width, false);
            }
            const bool begun = sight.seen_later(block, n);
            if (begun) turns.wait(task - stride_of(sizes), chunk);
            add_columns(buffers.dk, block, n, columns, sizes, sight.scale, begun, dk);
            if (v) add_columns(buffers.dv, block, n, columns, sizes, T{1}, begun, *dv);
            turns.finish(task, chunk);
        }

        for (int64_t r = 0; r < block.rows(); ++r) {
            Element* target = dq.at<Element>(block.example, block.head(r), block.token(r));
            store_row(buffers.dq + r * sizes.width, dq.strides[3], sizes.depth, sight.scale, target);
        }
    });
}

}  // namespace

void attention_with_lse_forward(
    const View& q, const View& k, const View* v, const Visibility& visibility, const View* out, const View& lse,
    int threads) {
    dispatch(q.dtype, [&](auto element, auto accumulator) {
        using T = decltype(accumulator);
        forward<decltype(element), T>(q, k, v, sight_of<T>(q, visibility), out, lse, threads);
    });
}

void attention_with_lse_backward(
    const View* grad_out, const View& grad_lse, const View& q, const View& k, const View* v,
    const Visibility& visibility, const View* out, const View& lse, const View& dq, const View& dk, const View* dv,
    int threads) {
    dispatch(q.dtype, [&](auto element, auto accumulator) {
        using T = decltype(accumulator);
        const Sight<T> sight = sight_of<T>(q, visibility);
        backward<decltype(element), T>(grad_out, grad_lse, q, k, v, sight, out, lse, dq, dk, dv, threads);
    });
}

}  // namespace mold::MOLD_LEVEL
