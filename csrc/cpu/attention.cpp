#include "attention_rows.hpp"
#include "level_kernels.hpp"

// Flash attention whose backward takes the gradient of the log-sum-exp; formulas in mold_kernels/attention.py. A task is
// a block of rows, the last ones first: they see the most columns. Nothing of size T is stored beside inputs and
// outputs. Five products a block and column block in the backward, two in the forward, each 2 rows columns D FLOPs.
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

// -infinity where a row must not see column `token`.
template <typename T>
void hide_rows(const View* mask, const RowBlock& block, int64_t token, int64_t first, int64_t rows, T* products) {
    const bool padding = mask && !mask->at<const bool>(block.example)[token * mask->strides[1]];
    hide(products, first, padding ? rows : block.hidden_from(token));
}

template <typename Element, typename T>
void forward(
    const View& q, const View& k, const View& v, const View* mask, T scale, const View& out, const View& lse,
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

        for (int64_t n = 0; n < end; n += block_columns) {
            const int64_t columns = smaller(block_columns, end - n);
            const int64_t first = block.hidden_from(n) / tile_width<T> * tile_width<T>;
            load_columns<Element>(k, block, n, columns, sizes, buffers.columns);
            multiply_panels(
                columns, sizes.depth, buffers.columns, sizes.width, buffers.panels, first, rows, buffers.products,
                rows);
            for (int64_t i = 0; i < columns; ++i) {
                hide_rows(mask, block, n + i, first, rows, buffers.products + i * rows);
            }
            for (int64_t r = first; r < rows; r += lanes<T>) {
                const Vector<T> before = load(buffers.most + r);
                Vector<T> most = before;
                for (int64_t i = 0; i < columns; ++i) {
                    T* entry = buffers.products + i * rows + r;
                    const Vector<T> score = load(entry) * scale;
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
            for (int64_t r = first; r < rows; ++r) {
                T* row = buffers.out + r * sizes.width;
                for (int64_t d = 0; d < sizes.width; d += lanes<T>) store<T>(load(row + d) * buffers.factor[r], row + d);
            }
            load_columns<Element>(v, block, n, columns, sizes, buffers.columns);
            multiply<T>(
                rows - first, sizes.width, columns, {buffers.products + first, 1, rows}, buffers.columns, sizes.width,
                buffers.out + first * sizes.width, sizes.width, true);
        }

        for (int64_t r = 0; r < block.rows(); ++r) {
            const T total = buffers.total[r];
            const int64_t head = block.head(r), token = block.token(r);
            Element* target = out.at<Element>(block.example, head, token);
            const T factor = total > 0 ? 1 / total : total;  // NaN stays NaN
            store_row(buffers.out + r * sizes.width, out.strides[3], sizes.depth, factor, target);
            *lse.at<T>(block.example, head, token) =
                total == 0 ? static_cast<T>(HUGE_VAL) : buffers.most[r] + std::log(total);
        }
    });
}

// sums[r] = <a[r], b[r]> - minus[r].
template <typename T>
void row_products(const T* a, const T* b, int64_t rows, int64_t width, const T* minus, T* sums) {
    for (int64_t r = 0; r < rows; ++r) {
        Vector<T> total{};
        for (int64_t d = 0; d < width; d += lanes<T>) total += load(a + r * width + d) * load(b + r * width + d);
        sums[r] = sum<T>(total) - minus[r];
    }
}

template <typename Element, typename T>
void backward(
    const View& grad_out, const View& grad_lse, const View& q, const View& k, const View& v, const View* mask, T scale,
    const View& out, const View& lse, const View& dq, const View& dk, const View& dv, int threads) {
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
        const bool last_block = end == sizes.length;
        load_rows<Element>(q, block, buffers.q, sizes.width);
        transpose(buffers.q, rows, sizes.depth, sizes.width, buffers.q_panels);
        load_rows<Element>(grad_out, block, buffers.grad, sizes.width);
        transpose(buffers.grad, rows, sizes.depth, sizes.width, buffers.grad_panels);
        load_entries(grad_lse, block, T{0}, buffers.lse);
        load_rows<Element>(out, block, buffers.dq, sizes.width);
        row_products(buffers.grad, buffers.dq, rows, sizes.width, buffers.lse, buffers.delta);
        load_entries(lse, block, static_cast<T>(HUGE_VAL), buffers.lse);  // padded rows: exp(0 - infinity) = 0
        for (int64_t i = 0; i < rows * sizes.width; ++i) buffers.dq[i] = 0;

        for (int64_t n = 0, chunk = 0; n < end; n += block_columns, ++chunk) {
            const int64_t columns = smaller(block_columns, end - n);
            const int64_t first = block.hidden_from(n) / tile_width<T> * tile_width<T>, seen = rows - first;
            load_columns<Element>(k, block, n, columns, sizes, buffers.keys);
            load_columns<Element>(v, block, n, columns, sizes, buffers.values);
            multiply_panels(
                columns, sizes.depth, buffers.keys, sizes.width, buffers.q_panels, first, rows, buffers.probabilities,
                rows);
            multiply_panels(
                columns, sizes.depth, buffers.values, sizes.width, buffers.grad_panels, first, rows, buffers.weights,
                rows);
            for (int64_t i = 0; i < columns; ++i) {
                T *probabilities = buffers.probabilities + i * rows, *weights = buffers.weights + i * rows;
                hide_rows(mask, block, n + i, first, rows, probabilities);
                for (int64_t r = first; r < rows; r += lanes<T>) {
                    const Vector<T> probability =
                        exponential<T>(load(probabilities + r) * scale - load(buffers.lse + r));
                    store<T>(probability, probabilities + r);
                    store<T>(probability * (load(weights + r) - load(buffers.delta + r)), weights + r);
                }
            }
            const T *probabilities = buffers.probabilities + first, *weights = buffers.weights + first;
            multiply<T>(
                seen, sizes.width, columns, {weights, 1, rows}, buffers.keys, sizes.width,
                buffers.dq + first * sizes.width, sizes.width, true);
            multiply<T>(
                columns, sizes.width, seen, {weights, rows, 1}, buffers.q + first * sizes.width, sizes.width,
                buffers.dk, sizes.width, false);
            multiply<T>(
                columns, sizes.width, seen, {probabilities, rows, 1}, buffers.grad + first * sizes.width, sizes.width,
                buffers.dv, sizes.width, false);
            if (!last_block) turns.wait(task - stride_of(sizes), chunk);
            for (int64_t i = 0; i < columns; ++i) {
                T* dk_row = dk.at<T>(block.example, block.kv_head, n + i);
                T* dv_row = dv.at<T>(block.example, block.kv_head, n + i);
                for (int64_t d = 0; d < sizes.depth; ++d) {
                    const T key = scale * buffers.dk[i * sizes.width + d], value = buffers.dv[i * sizes.width + d];
                    dk_row[d] = last_block ? key : dk_row[d] + key;
                    dv_row[d] = last_block ? value : dv_row[d] + value;
                }
            }
            turns.finish(task, chunk);
        }

        for (int64_t r = 0; r < block.rows(); ++r) {
            Element* target = dq.at<Element>(block.example, block.head(r), block.token(r));
            store_row(buffers.dq + r * sizes.width, dq.strides[3], sizes.depth, scale, target);
        }
    });
}

}  // namespace

void attention_with_lse_forward(
    const View& q, const View& k, const View& v, const View* mask, double scale, const View& out, const View& lse,
    int threads) {
    dispatch(q.dtype, [&](auto element, auto accumulator) {
        using T = decltype(accumulator);
        forward<decltype(element), T>(q, k, v, mask, static_cast<T>(scale), out, lse, threads);
    });
}

void attention_with_lse_backward(
    const View& grad_out, const View& grad_lse, const View& q, const View& k, const View& v, const View* mask,
    double scale, const View& out, const View& lse, const View& dq, const View& dk, const View& dv, int threads) {
    dispatch(q.dtype, [&](auto element, auto accumulator) {
        using T = decltype(accumulator);
        backward<decltype(element), T>(
            grad_out, grad_lse, q, k, v, mask, static_cast<T>(scale), out, lse, dq, dk, dv, threads);
    });
}

}  // namespace mold::MOLD_LEVEL
