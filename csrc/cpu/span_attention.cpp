#include "level_kernels.hpp"
#include "span_rows.hpp"

// Formulas in mold_kernels/span_attention.py. A task is a piece of the rows: forward with all heads, backward with the
// heads that share a key head. The key words' columns are gathered and transposed once. Few rows take the keys as they lie.
namespace mold::MOLD_LEVEL {
namespace {

// The key vectors of the columns: rows [B, Hkv, columns, width], stacked rows [B, Hkv, columns / pack, sum_width, pack]
// and panels [B, Hkv, columns / block_columns], each stacked [depth / pack, block_columns, pack]. What a block has beyond
// an example's columns is zero up to whole vectors and unset from there on. Without panels if `few` rows are all there is.
template <typename Element, typename N>
struct Keys {
    Sizes sizes;
    bool few;
    Memory memory;
    N* data;

    Keys(const View& k, const SpanPlan* plans, const Sizes& sizes, bool few, int threads)
        : sizes(sizes),
          few(few),
          memory(sizes.batch * sizes.kv_heads * size() * static_cast<int64_t>(sizeof(N))),
          data(reinterpret_cast<N*>(memory.data)) {
        const auto gather = [&](int64_t i, int) {
            const int64_t b = i / sizes.kv_heads, head = i % sizes.kv_heads;
            const int64_t count = plans[b].column_count, padded = round_up(count, lanes<Sum<N>>);
            N* target = rows(b, head);
            for (int64_t n = 0; n < count; ++n) {
                const Element* key = k.at<const Element>(b, head, plans[b].columns[n]);
                load_row(key, k.strides[3], sizes.head_dim, target + n * sizes.width, sizes.width);
            }
            for (int64_t j = count * sizes.width; j < padded * sizes.width; ++j) target[j] = N{};
            if (few) return;
            transpose<N, block_columns>(target, padded, sizes.depth, sizes.width, panels(b, head));
            stack(target, padded, sizes.width, sizes.sum_width, stacked(b, head));
        };
        parallel(threads, sizes.batch * sizes.kv_heads, [](Scratch&) { return 0; }, gather);
    }

    int64_t stacked_size() const { return pack<N> == 1 ? 0 : sizes.most_columns * sizes.sum_width; }
    int64_t size() const { return sizes.most_columns * (sizes.width + sizes.depth) + stacked_size(); }
    N* rows(int64_t example, int64_t kv_head) const { return data + (example * sizes.kv_heads + kv_head) * size(); }
    N* panels(int64_t example, int64_t kv_head) const {
        return rows(example, kv_head) + sizes.most_columns * sizes.width;
    }
    N* stacked(int64_t example, int64_t kv_head) const {
        return pack<N> == 1 ? rows(example, kv_head) : panels(example, kv_head) + sizes.most_columns * sizes.depth;
    }
    KeyBlock<N> block(int64_t example, int64_t kv_head, int64_t n) const {
        const N* panel = few ? nullptr : panels(example, kv_head) + n * sizes.depth;
        return {panel, rows(example, kv_head) + n * sizes.width, sizes.width};
    }
};

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
    const View& q, const View& k, const View& lse, const SpanPlan* plans, const Visibility& visibility,
    const View& pooled, const View* first_rows, int threads) {
    using N = Number<Element, T>;
    const Sizes sizes = sizes_of<N>(q, k, plans, pooled.sizes[3]);
    const Keys<Element, N> keys(k, plans, sizes, sizes.few, threads);
    const int64_t pieces = count_pieces(plans, sizes.batch), groups = pooled.sizes[1], heads = q.sizes[1] / groups;
    const int64_t cells = pieces * groups * sizes.key_words;
    const bool maxima = plans[0].reduction == RowReduction::max;
    const Memory values(cells * static_cast<int64_t>(sizeof(double)));
    const Memory places(maxima ? cells * static_cast<int64_t>(sizeof(std::int32_t)) : 0);
    double* of_pieces = reinterpret_cast<double*>(values.data);  // in the order of the tasks
    std::int32_t* first_of_pieces = reinterpret_cast<std::int32_t*>(places.data);

    struct Buffers {
        Sight<T> sight;
        N* q;
        T *lse, *of_rows;  // [rows, columns], over heads, for maxima
        double* columns;
    };
    const auto make = [&](Scratch& scratch) {
        return Buffers{
            Sight<T>(scratch, sizes, visibility), scratch.take<N>(sizes.most_tokens * sizes.width),
            scratch.take<T>(sizes.most_tokens), scratch.take<T>(maxima ? sizes.most_tokens * sizes.most_columns : 0),
            scratch.take<double>(sizes.most_columns)};
    };
    parallel(threads, pieces, make, [&](int64_t task, Buffers& buffers) {
        const Piece at = piece_of_task(plans, task);
        const SpanPlan& plan = plans[at.example];
        const Range piece = plan.pieces[at.index];
        Sight<T>& sight = buffers.sight;
        sight.look(plan.columns, plan.column_count, at.example, piece);
        for (int64_t x = 0; x < groups; ++x) {
            const int64_t of_all_rows = maxima ? sight.rows * sizes.most_columns : 0;
            for (int64_t i = 0; i < of_all_rows; ++i) buffers.of_rows[i] = 0;
            for (int64_t n = 0; n < sizes.most_columns; ++n) buffers.columns[n] = 0;
            for (int64_t head = x * heads; head < (x + 1) * heads; ++head) {
                const Matrix<N> rows = rows_of<Element>(q, at.example, head, piece, sizes, buffers.q);
                load_entries(lse, at.example, head, piece, buffers.lse);
                for (int64_t n = sight.begin; n < sight.columns; n += block_columns) {
                    const int64_t first = sight.template first_row<N>(n), last = sight.template last_row<N>(n);
                    const auto add = [&](int64_t c, auto seen) {
                        Vector<T> total{};
                        for (int64_t r = first; r < last; ++r) total += seen(r).probability;
                        for (int64_t lane = 0; lane < lanes<T>; ++lane) buffers.columns[n + c + lane] += total[lane];
                    };
                    const auto add_to_rows = [&](int64_t c, auto seen) {
                        for (int64_t r = first; r < last; ++r) {
                            T* total = buffers.of_rows + r * sizes.most_columns + n + c;
                            store<T>(load(total) + seen(r).probability, total);
                        }
                    };
                    const KeyBlock<N> block = keys.block(at.example, head / sizes.group, n);
                    if (maxima) {
                        sight.visit_vectors(n, rows, sizes, block, buffers.lse, add_to_rows);
                    } else {
                        sight.visit_vectors(n, rows, sizes, block, buffers.lse, add);
                    }
                }
            }
            for (int64_t m = 0; m < sizes.key_words; ++m) {
                const Range word = plan.key_words[m];
                const int64_t cell = (task * groups + x) * sizes.key_words + m;
                double total = 0;
                if (maxima) {
                    first_of_pieces[cell] = -1;
                    for (int64_t r = 0; r < sight.rows; ++r) {
                        double of_row = 0;
                        for (int64_t n = word.begin; n < word.end; ++n) {
                            of_row += buffers.of_rows[r * sizes.most_columns + n];
                        }
                        keep_more(of_row, piece.begin + r, total, first_of_pieces[cell]);
                    }
                } else {
                    for (int64_t n = word.begin; n < word.end; ++n) total += buffers.columns[n];
                }
                of_pieces[cell] = total;
            }
        }
    });

    int64_t end = 0;  // of the example's tasks
    for (int64_t b = 0; b < sizes.batch; ++b) {
        const SpanPlan& plan = plans[b];
        end += static_cast<int64_t>(plan.pieces.size());
        for (int64_t x = 0; x < groups; ++x) {
            for (int64_t s = 0; s < pooled.sizes[2]; ++s) {
                T* target = pooled.at<T>(b, x, s);
                for (int64_t m = 0; m < sizes.key_words; ++m) {
                    double total = 0;
                    std::int32_t first = -1;
                    for (int64_t p = plan.steps[s].begin; p < plan.steps[s].end; ++p) {
                        const int64_t cell = ((end - 1 - p) * groups + x) * sizes.key_words + m;
                        if (maxima) {
                            keep_more(of_pieces[cell], first_of_pieces[cell], total, first);
                        } else {
                            total += of_pieces[cell];
                        }
                    }
                    target[m] = static_cast<T>(total * plan.weights[s] / heads);
                    if (first_rows) first_rows->at<std::int32_t>(b, x, s)[m] = first;
                }
            }
        }
    }
}

// Adds g[n], the gradient of the piece's probabilities of heads x at column n.
template <typename T>
void column_gradient(
    const View& grad, const SpanPlan& plan, const Piece& at, int64_t x, int64_t heads, double* of_words, T* of_columns) {
    const int64_t words = grad.sizes[3];
    for (int64_t m = 0; m < words; ++m) of_words[m] = 0;
    for (std::size_t s = 0; s < plan.steps.size(); ++s) {
        if (at.index < plan.steps[s].begin || at.index >= plan.steps[s].end) continue;
        const T* row = grad.at<const T>(at.example, x, s);
        for (int64_t m = 0; m < words; ++m) {
            of_words[m] += plan.weights[s] / heads * row[m * grad.strides[3]];
        }
    }
    if (plan.key_words.empty()) {
        for (int64_t n = 0; n < plan.column_count; ++n) of_columns[n] = static_cast<T>(of_words[plan.columns[n]]);
        return;
    }
    for (int64_t m = 0; m < words; ++m) {
        for (int64_t n = plan.key_words[m].begin; n < plan.key_words[m].end; ++n) {
            of_columns[n] += static_cast<T>(of_words[m]);
        }
    }
}

// Likewise of maxima: each has its gradient at one row, [rows, columns] of them.
template <typename T>
void row_gradient(
    const View& grad, const View& first, const SpanPlan& plan, const Piece& at, int64_t x, int64_t heads, int64_t columns,
    T* of_rows) {
    const Range piece = plan.pieces[at.index];
    for (std::size_t s = 0; s < plan.steps.size(); ++s) {
        if (at.index < plan.steps[s].begin || at.index >= plan.steps[s].end) continue;
        const T* row = grad.at<const T>(at.example, x, s);
        const std::int32_t* places = first.at<const std::int32_t>(at.example, x, s);
        const auto add = [&](int64_t word, int64_t begin, int64_t end) {
            const int64_t place = places[word];
            if (place < piece.begin || place >= piece.end) return;
            T* target = of_rows + (place - piece.begin) * columns;
            for (int64_t n = begin; n < end; ++n) target[n] += row[word * grad.strides[3]] / static_cast<T>(heads);
        };
        for (std::size_t m = 0; m < plan.key_words.size(); ++m) add(m, plan.key_words[m].begin, plan.key_words[m].end);
        for (int64_t n = 0; plan.key_words.empty() && n < plan.column_count; ++n) add(plan.columns[n], n, n + 1);
    }
}

template <typename Element, typename T>
void backward(
    const View& grad, const View& q, const View& k, const View& lse, const View* first_rows, const SpanPlan* plans,
    const Visibility& visibility, const View& dq, const View& dk, const View& dlse, int threads) {
    using N = Number<Element, T>;
    const Sizes sizes = sizes_of<N>(q, k, plans, grad.sizes[3]);
    const Keys<Element, N> keys(k, plans, sizes, false, threads);
    const int64_t tasks = count_pieces(plans, sizes.batch) * sizes.kv_heads;
    const int64_t groups = grad.sizes[1], heads = q.sizes[1] / groups;
    const bool each = heads < sizes.group;  // the heads of a task have a gradient each
    // A gradient is one of all the piece's rows, or of maxima one of each.
    const int64_t gradient_row = first_rows ? sizes.most_columns : 0;
    const int64_t gradient_size = sizes.most_columns * (first_rows ? sizes.most_tokens : 1);
    Turns turns(tasks);

    // `weights` are rows, `stacked_weights` has them stacked; with a pack of one both are where the scores are.
    struct Buffers {
        Sight<T> sight;
        double* word_gradient;
        Matrix<N>* rows;  // of each head of the group
        N *q, *stacked_q, *weights, *stacked_weights;
        T *gradient, *lse, *dq, *dk, *dlse;  // dlse [rows, lanes], to be summed
    };
    const auto make = [&](Scratch& scratch) {
        const int64_t of_rows = sizes.group * sizes.most_tokens, products = sizes.most_tokens * block_columns;
        Buffers buffers{
            Sight<T>(scratch, sizes, visibility),
            scratch.take<double>(sizes.key_words),
            scratch.take<Matrix<N>>(sizes.group),
            scratch.take<N>(of_rows * sizes.width),
            nullptr,
            nullptr,
            nullptr,
            scratch.take<T>(gradient_size * (each ? sizes.group : 1)),
            scratch.take<T>(of_rows),
            scratch.take<T>(of_rows * sizes.sum_width),
            scratch.take<T>(block_columns * sizes.sum_width),
            scratch.take<T>(of_rows * lanes<T>)};
        if constexpr (pack<N> == 1) {
            buffers.weights = buffers.stacked_weights = buffers.sight.scores;
        } else {
            buffers.stacked_q = scratch.take<N>(sizes.most_tokens * sizes.sum_width);
            buffers.weights = scratch.take<N>(products);
            buffers.stacked_weights = scratch.take<N>(products);
        }
        return buffers;
    };
    parallel(threads, tasks, make, [&](int64_t task, Buffers& buffers) {
        const Piece at = piece_of_task(plans, task / sizes.kv_heads);
        const SpanPlan& plan = plans[at.example];
        const Range piece = plan.pieces[at.index];
        const int64_t kv_head = task % sizes.kv_heads, tokens = piece.end - piece.begin;
        const bool last_piece = at.index + 1 == static_cast<int64_t>(plan.pieces.size());
        const N* key_rows = keys.stacked(at.example, kv_head);
        Sight<T>& sight = buffers.sight;
        sight.look(plan.columns, plan.column_count, at.example, piece);
        for (int64_t g = 0; g < (each ? sizes.group : 1); ++g) {
            T* gradient = buffers.gradient + g * gradient_size;
            for (int64_t n = 0; n < sizes.most_columns + gradient_row * (tokens - 1); ++n) gradient[n] = 0;
            const int64_t x = (kv_head * sizes.group + g) / heads;
            if (first_rows) {
                row_gradient(grad, *first_rows, plan, at, x, heads, gradient_row, gradient);
            } else {
                column_gradient(grad, plan, at, x, heads, buffers.word_gradient, gradient);
            }
        }
        for (int64_t i = 0; i < sizes.group * tokens * sizes.sum_width; ++i) buffers.dq[i] = 0;
        for (int64_t i = 0; i < sizes.group * tokens * lanes<T>; ++i) buffers.dlse[i] = 0;
        for (int64_t g = 0; g < sizes.group; ++g) {
            const int64_t head = kv_head * sizes.group + g;
            buffers.rows[g] =
                rows_of<Element>(q, at.example, head, piece, sizes, buffers.q + g * tokens * sizes.width);
            load_entries(lse, at.example, head, piece, buffers.lse + g * tokens);
        }

        // The column blocks of the next piece, whose sums come before this one's.
        const int64_t next = last_piece ? sight.columns : sight.first_block(
            plan.columns, plan.column_count, at.example, plan.pieces[at.index + 1].begin);
        for (int64_t n = sight.begin; n < sight.columns; n += block_columns) {
            const int64_t columns = smaller(block_columns, sight.columns - n), chunk = n / block_columns;
            const int64_t first = sight.template first_row<N>(n), last = sight.template last_row<N>(n);
            const int64_t seen_rows = last - first, columns_packed = round_up(columns, pack<N>);
            for (int64_t g = 0; g < sizes.group; ++g) {
                const Matrix<N> rows = buffers.rows[g];
                T *dq = buffers.dq + g * tokens * sizes.sum_width, *dlse = buffers.dlse + g * tokens * lanes<T>;
                const T* of_columns = buffers.gradient + (each ? g * gradient_size : 0) + n;
                const auto weigh = [&](int64_t c, auto seen) {
                    for (int64_t r = first; r < last; r += pack<N>) {
                        Vector<T> weights[pack<N>]{};
                        for (int64_t e = 0; e < smaller(pack<N>, last - r); ++e) {
                            const Seen<T> found = seen(r + e);
                            const Vector<T> weight = found.probability * load(of_columns + (r + e) * gradient_row + c);
                            T* total = dlse + (r + e) * lanes<T>;
                            store<T>(load(total) - weight, total);
                            weights[e] = weight * found.slope;
                        }
                        const int64_t row = r * block_columns;
                        N *plain = buffers.weights + row + c, *stacked = buffers.stacked_weights + row + c * pack<N>;
                        store_numbers<N>(weights, plain, block_columns, stacked);
                    }
                };
                const KeyBlock<N> block = keys.block(at.example, kv_head, n);
                sight.visit_vectors(n, rows, sizes, block, buffers.lse + g * tokens, weigh);
                const int64_t first_weight = first * block_columns;
                multiply<N>(
                    seen_rows, sizes.sum_width, columns_packed, {buffers.weights + first_weight, block_columns, 1},
                    key_rows + n * sizes.sum_width, sizes.sum_width, dq + first * sizes.sum_width, sizes.sum_width,
                    true);
                const N* seen_q = rows.data + first * rows.row;
                int64_t row = rows.row;
                if constexpr (pack<N> > 1) {
                    seen_q = stack(seen_q, seen_rows, rows.row, sizes.sum_width, buffers.stacked_q);
                    row = sizes.sum_width;
                }
                multiply<N>(
                    columns, sizes.sum_width, round_up(seen_rows, pack<N>),
                    {buffers.stacked_weights + first_weight, pack<N>, block_columns}, seen_q, row, buffers.dk,
                    sizes.sum_width, g > 0);
            }
            if (n >= next && !last_piece) turns.wait(task - sizes.kv_heads, chunk);
            for (int64_t i = 0; i < columns; ++i) {
                T* target = dk.at<T>(at.example, kv_head, plan.columns[n + i]);
                const T* source = buffers.dk + i * sizes.sum_width;
                for (int64_t d = 0; d < sizes.head_dim; ++d) target[d * dk.strides[3]] += sight.scale * source[d];
            }
            turns.finish(task, chunk);
        }

        for (int64_t r = 0; r < sizes.group * tokens; ++r) {
            const int64_t head = kv_head * sizes.group + r / tokens, token = piece.begin + r % tokens;
            Element* target = dq.at<Element>(at.example, head, token);
            store_row(buffers.dq + r * sizes.sum_width, dq.strides[3], sizes.head_dim, sight.scale, target);
            *dlse.at<T>(at.example, head, token) = sum<T>(load(buffers.dlse + r * lanes<T>));
        }
    });
}

}  // namespace

void span_attention_forward(
    const View& q, const View& k, const View& lse, const SpanPlan* plans, const Visibility& visibility,
    const View& pooled, const View* first, int threads) {
    dispatch(q.dtype, [&](auto element, auto accumulator) {
        forward<decltype(element), decltype(accumulator)>(q, k, lse, plans, visibility, pooled, first, threads);
    });
}

void span_attention_backward(
    const View& grad, const View& q, const View& k, const View& lse, const View* first, const SpanPlan* plans,
    const Visibility& visibility, const View& dq, const View& dk, const View& dlse, int threads) {
    dispatch(q.dtype, [&](auto element, auto accumulator) {
        backward<decltype(element), decltype(accumulator)>(
            grad, q, k, lse, first, plans, visibility, dq, dk, dlse, threads);
    });
}

}  // namespace mold::MOLD_LEVEL
