#include "span_plan.hpp"
#include "attention_rows.hpp"
#include "level_kernels.hpp"

// Formulas in mold_kernels/span_attention.py. A task is a piece of the rows: forward with all heads, backward with the
// heads that share a key head. The key words' columns are gathered once; only those that a piece sees are multiplied.
namespace mold::MOLD_LEVEL {
namespace {

struct Sizes {
    int64_t batch, kv_heads, group, depth, width, most_rows, most_columns, key_words;
};

template <typename T>
Sizes sizes_of(const View& q, const View& k, const SpanPlan* plans, int64_t key_words) {
    Sizes sizes{q.sizes[0], k.sizes[1], q.sizes[1] / k.sizes[1], q.sizes[3], round_up(q.sizes[3], lanes<T>), 0, 0,
                key_words};
    for (int64_t b = 0; b < sizes.batch; ++b) {
        sizes.most_columns = larger(sizes.most_columns, static_cast<int64_t>(plans[b].columns.size()));
        for (const Range& piece : plans[b].pieces) {
            sizes.most_rows = larger(sizes.most_rows, round_up((piece.end - piece.begin) * sizes.group, lanes<T>));
        }
    }
    return sizes;
}

// The key vectors of the columns, [B, Hkv, N, width].
template <typename Element, typename T>
struct Keys {
    Sizes sizes;
    Memory memory;
    T* data;

    Keys(const View& k, const SpanPlan* plans, const Sizes& sizes, int threads)
        : sizes(sizes),
          memory(sizes.batch * sizes.kv_heads * sizes.most_columns * sizes.width * static_cast<int64_t>(sizeof(T))),
          data(reinterpret_cast<T*>(memory.data)) {
        const auto gather = [&](int64_t i, int) {
            const int64_t b = i / sizes.kv_heads, head = i % sizes.kv_heads;
            const std::vector<int64_t>& columns = plans[b].columns;
            T* target = at(b, head);
            for (std::size_t n = 0; n < columns.size(); ++n, target += sizes.width) {
                const Element* key = k.at<const Element>(b, head, columns[n]);
                load_row(key, k.strides[3], sizes.depth, target, sizes.width);
            }
        };
        parallel(threads, sizes.batch * sizes.kv_heads, [](Scratch&) { return 0; }, gather);
    }

    T* at(int64_t example, int64_t kv_head) const {
        return data + (example * sizes.kv_heads + kv_head) * sizes.most_columns * sizes.width;
    }
};

template <typename T>
struct Rows {
    T *q, *panels, *lse, *products;

    Rows(Scratch& scratch, const Sizes& sizes)
        : q(scratch.take<T>(sizes.most_rows * sizes.width)),
          panels(scratch.take<T>(round_up(sizes.most_rows, tile_width<T>) * sizes.depth)),
          lse(scratch.take<T>(sizes.most_rows)),
          products(scratch.take<T>(block_columns * sizes.most_rows)) {}

    template <typename Element>
    void load(const View& q_view, const View& lse_view, const RowBlock& block, const Sizes& sizes) {
        load_rows<Element>(q_view, block, q, sizes.width);
        transpose(q, round_up(block.rows(), lanes<T>), sizes.depth, sizes.width, panels);
        // exp(score - infinity) = 0: padded rows add nothing.
        load_entries(lse_view, block, static_cast<T>(HUGE_VAL), lse);
    }

    // Products of the columns with the rows, -infinity where hidden, to visit(column, products, first row, rows).
    // Rows before the first, which is returned, see none of the columns.
    template <typename Visit>
    int64_t visit_columns(
        const RowBlock& block, const SpanPlan& plan, const T* keys, Range columns, const Sizes& sizes, Visit visit) {
        const int64_t rows = round_up(block.rows(), lanes<T>);
        const int64_t first = block.hidden_from(plan.columns[columns.begin]) / tile_width<T> * tile_width<T>;
        multiply_panels(
            columns.end - columns.begin, sizes.depth, keys + columns.begin * sizes.width, sizes.width, panels, first,
            rows, products, rows);
        for (int64_t n = columns.begin; n < columns.end; ++n) {
            T* scores = products + (n - columns.begin) * rows;
            hide(scores, first, block.hidden_from(plan.columns[n]));
            visit(n, scores, first, rows);
        }
        return first;
    }
};

// The columns that a piece's last row sees.
int64_t visible_columns(const SpanPlan& plan, const Range& piece) {
    int64_t low = 0, high = static_cast<int64_t>(plan.columns.size());
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (plan.columns[middle] < piece.end) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

struct Piece {
    int64_t example, index;
};

int64_t count_pieces(const SpanPlan* plans, int64_t batch) {
    int64_t count = 0;
    for (int64_t b = 0; b < batch; ++b) count += static_cast<int64_t>(plans[b].pieces.size());
    return count;
}

// An example's last piece comes first: it sees the most columns, and long tasks should not be left to the end.
Piece piece_of_task(const SpanPlan* plans, int64_t task) {
    int64_t example = 0;
    for (; task >= static_cast<int64_t>(plans[example].pieces.size()); ++example) task -= plans[example].pieces.size();
    return {example, static_cast<int64_t>(plans[example].pieces.size()) - 1 - task};
}

template <typename Element, typename T>
void forward(
    const View& q, const View& k, const View& lse, const SpanPlan* plans, T scale, const View& pooled, int threads) {
    const Sizes sizes = sizes_of<T>(q, k, plans, pooled.sizes[2]);
    const Keys<Element, T> keys(k, plans, sizes, threads);
    const int64_t pieces = count_pieces(plans, sizes.batch);
    const Memory memory(pieces * sizes.key_words * static_cast<int64_t>(sizeof(double)));
    double* of_pieces = reinterpret_cast<double*>(memory.data);  // in the order of the tasks

    struct Buffers {
        Rows<T> rows;
        double* columns;
    };
    const auto make = [&](Scratch& scratch) {
        return Buffers{Rows<T>(scratch, sizes), scratch.take<double>(sizes.most_columns)};
    };
    parallel(threads, pieces, make, [&](int64_t task, Buffers& buffers) {
        const Piece at = piece_of_task(plans, task);
        const SpanPlan& plan = plans[at.example];
        const Range piece = plan.pieces[at.index];
        const int64_t visible = visible_columns(plan, piece);
        for (std::size_t n = 0; n < plan.columns.size(); ++n) buffers.columns[n] = 0;
        for (int64_t head = 0; head < sizes.kv_heads; ++head) {
            const RowBlock block{at.example, head, sizes.group, piece.begin, piece.end - piece.begin};
            buffers.rows.template load<Element>(q, lse, block, sizes);
            for (int64_t n = 0; n < visible; n += block_columns) {
                const auto add = [&](int64_t column, const T* scores, int64_t first, int64_t rows) {
                    Vector<T> total{};
                    for (int64_t r = first; r < rows; r += lanes<T>) {
                        total += exponential<T>(load(scores + r) * scale - load(buffers.rows.lse + r));
                    }
                    buffers.columns[column] += sum<T>(total);
                };
                buffers.rows.visit_columns(
                    block, plan, keys.at(at.example, head), {n, smaller(n + block_columns, visible)}, sizes, add);
            }
        }
        for (int64_t m = 0; m < sizes.key_words; ++m) {
            double total = 0;
            for (int64_t n = plan.key_words[m].begin; n < plan.key_words[m].end; ++n) total += buffers.columns[n];
            of_pieces[task * sizes.key_words + m] = total;
        }
    });

    int64_t end = 0;  // of the example's tasks
    for (int64_t b = 0; b < sizes.batch; ++b) {
        const SpanPlan& plan = plans[b];
        end += static_cast<int64_t>(plan.pieces.size());
        for (int64_t s = 0; s < pooled.sizes[1]; ++s) {
            T* target = pooled.at<T>(b, s);
            for (int64_t m = 0; m < sizes.key_words; ++m) {
                double total = 0;
                for (int64_t p = plan.steps[s].begin; p < plan.steps[s].end; ++p) {
                    total += of_pieces[(end - 1 - p) * sizes.key_words + m];
                }
                target[m] = static_cast<T>(total * plan.weights[s] / q.sizes[1]);
            }
        }
    }
}

// g[n], the gradient of the piece's probabilities at column n.
template <typename T>
void column_gradient(
    const View& grad, const SpanPlan& plan, const Piece& at, int64_t heads, double* of_words, T* of_columns) {
    for (std::size_t m = 0; m < plan.key_words.size(); ++m) of_words[m] = 0;
    for (std::size_t s = 0; s < plan.steps.size(); ++s) {
        if (at.index < plan.steps[s].begin || at.index >= plan.steps[s].end) continue;
        const T* row = grad.at<const T>(at.example, s);
        for (std::size_t m = 0; m < plan.key_words.size(); ++m) {
            of_words[m] += plan.weights[s] / heads * row[m * grad.strides[2]];
        }
    }
    for (std::size_t n = 0; n < plan.columns.size(); ++n) of_columns[n] = 0;
    for (std::size_t m = 0; m < plan.key_words.size(); ++m) {
        for (int64_t n = plan.key_words[m].begin; n < plan.key_words[m].end; ++n) {
            of_columns[n] += static_cast<T>(of_words[m]);
        }
    }
}

template <typename Element, typename T>
void backward(
    const View& grad, const View& q, const View& k, const View& lse, const SpanPlan* plans, T scale, const View& dq,
    const View& dk, const View& dlse, int threads) {
    const Sizes sizes = sizes_of<T>(q, k, plans, grad.sizes[2]);
    const Keys<Element, T> keys(k, plans, sizes, threads);
    const int64_t tasks = count_pieces(plans, sizes.batch) * sizes.kv_heads;
    Turns turns(tasks);

    struct Buffers {
        Rows<T> rows;
        double* word_gradient;
        T *gradient, *dq, *dk, *dlse;
    };
    const auto make = [&](Scratch& scratch) {
        return Buffers{
            Rows<T>(scratch, sizes),
            scratch.take<double>(sizes.key_words),
            scratch.take<T>(sizes.most_columns),
            scratch.take<T>(sizes.most_rows * sizes.width),
            scratch.take<T>(block_columns * sizes.width),
            scratch.take<T>(sizes.most_rows)};
    };
    parallel(threads, tasks, make, [&](int64_t task, Buffers& buffers) {
        const Piece at = piece_of_task(plans, task / sizes.kv_heads);
        const SpanPlan& plan = plans[at.example];
        const Range piece = plan.pieces[at.index];
        const int64_t head = task % sizes.kv_heads, visible = visible_columns(plan, piece);
        const bool last_piece = at.index + 1 == static_cast<int64_t>(plan.pieces.size());
        const RowBlock block{at.example, head, sizes.group, piece.begin, piece.end - piece.begin};
        const int64_t rows = round_up(block.rows(), lanes<T>);
        const T* head_keys = keys.at(at.example, head);
        buffers.rows.template load<Element>(q, lse, block, sizes);
        column_gradient(grad, plan, at, q.sizes[1], buffers.word_gradient, buffers.gradient);
        for (int64_t i = 0; i < rows * sizes.width; ++i) buffers.dq[i] = 0;
        for (int64_t r = 0; r < rows; ++r) buffers.dlse[r] = 0;

        for (int64_t n = 0, chunk = 0; n < visible; n += block_columns, ++chunk) {
            const int64_t columns = smaller(block_columns, visible - n);
            const auto weigh = [&](int64_t column, T* scores, int64_t first, int64_t rows) {
                const T g = buffers.gradient[column];
                for (int64_t r = first; r < rows; r += lanes<T>) {
                    const Vector<T> lse = load(buffers.rows.lse + r);
                    const Vector<T> weight = exponential<T>(load(scores + r) * scale - lse) * g;
                    store<T>(load(buffers.dlse + r) - weight, buffers.dlse + r);
                    store<T>(weight, scores + r);
                }
            };
            const int64_t first =
                buffers.rows.visit_columns(block, plan, head_keys, {n, n + columns}, sizes, weigh);
            const T* weights = buffers.rows.products + first;
            multiply<T>(
                rows - first, sizes.width, columns, {weights, 1, rows}, head_keys + n * sizes.width, sizes.width,
                buffers.dq + first * sizes.width, sizes.width, true);
            multiply<T>(
                columns, sizes.width, rows - first, {weights, rows, 1}, buffers.rows.q + first * sizes.width,
                sizes.width, buffers.dk, sizes.width, false);
            if (!last_piece) turns.wait(task - sizes.kv_heads, chunk);
            for (int64_t i = 0; i < columns; ++i) {
                T* target = dk.at<T>(at.example, head, plan.columns[n + i]);
                const T* source = buffers.dk + i * sizes.width;
                for (int64_t d = 0; d < sizes.depth; ++d) target[d * dk.strides[3]] += scale * source[d];
            }
            turns.finish(task, chunk);
        }

        for (int64_t r = 0; r < block.rows(); ++r) {
            Element* target = dq.at<Element>(at.example, block.head(r), block.token(r));
            store_row(buffers.dq + r * sizes.width, dq.strides[3], sizes.depth, scale, target);
            *dlse.at<T>(at.example, block.head(r), block.token(r)) = buffers.dlse[r];
        }
    });
}

}  // namespace

void span_attention_forward(
    const View& q, const View& k, const View& lse, const SpanPlan* plans, double scale, const View& pooled,
    int threads) {
    dispatch(q.dtype, [&](auto element, auto accumulator) {
        using T = decltype(accumulator);
        forward<decltype(element), T>(q, k, lse, plans, static_cast<T>(scale), pooled, threads);
    });
}

void span_attention_backward(
    const View& grad, const View& q, const View& k, const View& lse, const SpanPlan* plans, double scale,
    const View& dq, const View& dk, const View& dlse, int threads) {
    dispatch(q.dtype, [&](auto element, auto accumulator) {
        using T = decltype(accumulator);
        backward<decltype(element), T>(grad, q, k, lse, plans, static_cast<T>(scale), dq, dk, dlse, threads);
    });
}

}  // namespace mold::MOLD_LEVEL
