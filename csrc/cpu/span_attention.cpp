#include "span_pieces.hpp"
#include "attention_rows.hpp"
#include "level_kernels.hpp"

// Formulas in mold_kernels/span_attention.py. A task is a piece of the rows: forward with all heads, backward with the
// heads that share a key head. The key words' columns are gathered and transposed once, so products are [rows, columns]
// with vectors over columns: rows are read entry by entry as they lie. The columns that a row sees are neighbours.
// Where every key is a key word, sums over a piece would be as many as scores: forward a task is a block of columns then,
// with all rows, and adds up its columns of the result.
namespace mold::MOLD_LEVEL {
namespace {

// Rows of numbers are `width` wide, and of sums `sum_width`; their products have `depth` numbers. most_tokens are whole
// packs, most_columns whole blocks.
struct Sizes {
    int64_t batch, kv_heads, group, length, head_dim, depth, width, sum_width, most_tokens, most_columns, key_words;
};

template <typename N>
Sizes sizes_of(const View& q, const View& k, const SpanPlan* plans, int64_t key_words) {
    constexpr int64_t vector = lanes<Sum<N>>;
    const int64_t head_dim = q.sizes[3];
    Sizes sizes{
        q.sizes[0], k.sizes[1], q.sizes[1] / k.sizes[1], k.sizes[2], head_dim, round_up(head_dim, pack<N>),
        round_up(head_dim, vector * pack<N>), round_up(head_dim, vector), 0, 0, key_words};
    for (int64_t b = 0; b < sizes.batch; ++b) {
        sizes.most_columns = larger(sizes.most_columns, round_up(plans[b].column_count, block_columns));
        for (const Range& piece : plans[b].pieces) {
            sizes.most_tokens = larger(sizes.most_tokens, round_up(piece.end - piece.begin, pack<N>));
        }
    }
    return sizes;
}

// The key vectors of the columns: rows [B, Hkv, columns, width], stacked rows [B, Hkv, columns / pack, sum_width, pack]
// and panels [B, Hkv, columns / block_columns], each stacked [depth / pack, block_columns, pack]. What a block has beyond
// an example's columns is zero up to whole vectors and unset from there on.
template <typename Element, typename N>
struct Keys {
    Sizes sizes;
    Memory memory;
    N* data;

    Keys(const View& k, const SpanPlan* plans, const Sizes& sizes, int threads)
        : sizes(sizes),
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

    void look(const std::int32_t* of_columns, int64_t count, int64_t example, const Range& piece) {
        const int64_t position = visibility->first_position(example) + piece.begin;
        rows = piece.end - piece.begin;
        for (int64_t r = 0; r < rows; ++r) {
            firsts[r] = static_cast<Integer>(ranges.start(position + r) - position);
            lasts[r] = static_cast<Integer>(last(position + r) - position);
        }
        for (columns = 0; columns < count && of_columns[columns] - position <= lasts[rows - 1]; ++columns) {
            tokens[columns] = static_cast<Integer>(of_columns[columns] - position);
        }
        for (int64_t n = columns; n < round_up(columns, lanes<T>); ++n) tokens[n] = INT32_MAX;
        begin = first_block(of_columns, count, example, piece.begin);
    }

    // Of the columns that `row` may see, the first of the first column block.
    int64_t first_block(const std::int32_t* of_columns, int64_t count, int64_t example, int64_t row) const {
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

    // Products of the rows of q that see any of the block's columns with these; then visit(c, seen) for each of its
    // vectors, where seen(r) is what row r has of the columns from n + c on: a probability of 0 where hidden.
    template <typename N, typename Visit>
    void visit_vectors(int64_t n, Matrix<N> q, int64_t depth, const N* panel, const T* lse, Visit visit) {
        using Integers = typename VectorOf<T>::integers;
        const int64_t first = first_row<N>(n), width = smaller(block_columns, round_up(columns - n, lanes<T>));
        multiply<N>(
            last_row<N>(n) - first, width, depth, {q.data + first * q.row, q.row, q.column}, panel, block_columns,
            scores + first * block_columns, block_columns, false);
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
                const Vector<T> probability = exponential<T>(score);
                const Integers hidden = (token > lasts[r]) | (token < firsts[r]);
                return Seen<T>{hidden ? Vector<T>{} : probability, slope};
            });
        }
    }
};

// A piece's rows of one head of source [B, Hq, T, D]: as they lie where vectors can be read from them, else copied.
template <typename Element, typename N>
Matrix<N> rows_of(const View& source, int64_t example, int64_t head, const Range& piece, const Sizes& sizes, N* copy) {
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
void load_entries(const View& source, int64_t example, int64_t head, const Range& piece, T* target) {
    for (int64_t t = piece.begin; t < piece.end; ++t) target[t - piece.begin] = *source.at<const T>(example, head, t);
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
    const View& q, const View& k, const View& lse, const SpanPlan* plans, const Visibility& visibility,
    const View& pooled, int threads) {
    using N = Number<Element, T>;
    const Sizes sizes = sizes_of<N>(q, k, plans, pooled.sizes[3]);
    const Keys<Element, N> keys(k, plans, sizes, threads);
    const int64_t pieces = count_pieces(plans, sizes.batch), groups = pooled.sizes[1], heads = q.sizes[1] / groups;
    const Memory memory(pieces * groups * sizes.key_words * static_cast<int64_t>(sizeof(double)));
    double* of_pieces = reinterpret_cast<double*>(memory.data);  // in the order of the tasks

    struct Buffers {
        Sight<T> sight;
        N* q;
        T* lse;
        double* columns;
    };
    const auto make = [&](Scratch& scratch) {
        return Buffers{
            Sight<T>(scratch, sizes, visibility), scratch.take<N>(sizes.most_tokens * sizes.width),
            scratch.take<T>(sizes.most_tokens), scratch.take<double>(sizes.most_columns)};
    };
    parallel(threads, pieces, make, [&](int64_t task, Buffers& buffers) {
        const Piece at = piece_of_task(plans, task);
        const SpanPlan& plan = plans[at.example];
        const Range piece = plan.pieces[at.index];
        Sight<T>& sight = buffers.sight;
        sight.look(plan.columns, plan.column_count, at.example, piece);
        for (int64_t x = 0; x < groups; ++x) {
            for (int64_t n = 0; n < sizes.most_columns; ++n) buffers.columns[n] = 0;
            for (int64_t head = x * heads; head < (x + 1) * heads; ++head) {
                const N* panels = keys.panels(at.example, head / sizes.group);
                const Matrix<N> rows = rows_of<Element>(q, at.example, head, piece, sizes, buffers.q);
                load_entries(lse, at.example, head, piece, buffers.lse);
                for (int64_t n = sight.begin; n < sight.columns; n += block_columns) {
                    const int64_t first = sight.template first_row<N>(n), last = sight.template last_row<N>(n);
                    const auto add = [&](int64_t c, auto seen) {
                        Vector<T> total{};
                        for (int64_t r = first; r < last; ++r) total += seen(r).probability;
                        for (int64_t lane = 0; lane < lanes<T>; ++lane) buffers.columns[n + c + lane] += total[lane];
                    };
                    sight.visit_vectors(n, rows, sizes.depth, panels + n * sizes.depth, buffers.lse, add);
                }
            }
            for (int64_t m = 0; m < sizes.key_words; ++m) {
                double total = 0;
                for (int64_t n = plan.key_words[m].begin; n < plan.key_words[m].end; ++n) total += buffers.columns[n];
                of_pieces[(task * groups + x) * sizes.key_words + m] = total;
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
                    for (int64_t p = plan.steps[s].begin; p < plan.steps[s].end; ++p) {
                        total += of_pieces[((end - 1 - p) * groups + x) * sizes.key_words + m];
                    }
                    target[m] = static_cast<T>(total * plan.weights[s] / heads);
                }
            }
        }
    }
}

template <typename Element, typename T>
void forward_every_key(
    const View& q, const View& k, const View& lse, const SpanPlan* plans, const Visibility& visibility,
    const View& pooled, int threads) {
    using N = Number<Element, T>;
    Sizes sizes = sizes_of<N>(q, k, plans, pooled.sizes[3]);
    const int64_t groups = pooled.sizes[1], steps = pooled.sizes[2], heads = q.sizes[1] / groups;
    const int64_t blocks = sizes.most_columns / block_columns;
    sizes.most_columns = block_columns;
    sizes.most_tokens = larger(sizes.most_tokens, run_rows);

    // `sums` [steps, block_columns] are of steps that several pieces make up, `of_run` [pieces, block_columns] of a run.
    struct Buffers {
        Sight<T> sight;
        N *q, *keys, *panels;
        T *lse, *of_run;
        double* sums;
    };
    const auto make = [&](Scratch& scratch) {
        return Buffers{
            Sight<T>(scratch, sizes, visibility), scratch.take<N>(sizes.most_tokens * sizes.width),
            scratch.take<N>(block_columns * sizes.width), scratch.take<N>(sizes.kv_heads * block_columns * sizes.depth),
            scratch.take<T>(sizes.most_tokens), scratch.take<T>(run_rows * block_columns),
            scratch.take<double>(steps * block_columns)};
    };
    // The first columns are seen by the most rows.
    parallel(threads, blocks * sizes.batch, make, [&](int64_t task, Buffers& buffers) {
        const int64_t example = task % sizes.batch, n = task / sizes.batch * block_columns;
        const SpanPlan& plan = plans[example];
        const int64_t count = smaller(block_columns, plan.column_count - n), padded = round_up(count, lanes<T>);
        if (count <= 0) return;
        const int64_t token = plan.columns[n];  // columns are neighbours
        for (int64_t head = 0; head < sizes.kv_heads; ++head) {
            for (int64_t c = 0; c < padded; ++c) {
                const Element* key = k.at<const Element>(example, head, token + smaller(c, count - 1));
                const int64_t entries = c < count ? sizes.head_dim : 0;
                load_row(key, k.strides[3], entries, buffers.keys + c * sizes.width, sizes.width);
            }
            N* panel = buffers.panels + head * block_columns * sizes.depth;
            transpose<N, block_columns>(buffers.keys, padded, sizes.depth, sizes.width, panel);
        }
        Sight<T>& sight = buffers.sight;
        const Run* looked = nullptr;
        for (int64_t x = 0; x < groups; ++x) {
            for (int64_t i = 0; i < steps * block_columns; ++i) buffers.sums[i] = 0;
            for (const Run& run : plan.runs) {
                if (looked != &run) sight.look(plan.columns + n, count, example, run.rows);
                looked = &run;
                const int64_t first = sight.columns ? sight.template first_row<N>(0) : 0;
                const int64_t last = sight.columns ? sight.template last_row<N>(0) : 0;
                if (first == last) continue;
                const int64_t pieces = run.pieces.end - run.pieces.begin;
                for (int64_t i = 0; i < pieces * block_columns; ++i) buffers.of_run[i] = 0;
                for (int64_t head = x * heads; head < (x + 1) * heads; ++head) {
                    const Matrix<N> rows = rows_of<Element>(q, example, head, run.rows, sizes, buffers.q);
                    const N* panel = buffers.panels + head / sizes.group * block_columns * sizes.depth;
                    load_entries(lse, example, head, run.rows, buffers.lse);
                    sight.visit_vectors(0, rows, sizes.depth, panel, buffers.lse, [&](int64_t c, auto seen) {
                        T* sums = buffers.of_run + c;
                        for (int64_t p = run.pieces.begin; p < run.pieces.end; ++p, sums += block_columns) {
                            const Range piece = plan.pieces[p];
                            Vector<T> total = load(sums);
                            const int64_t end = smaller(piece.end - run.rows.begin, last);
                            for (int64_t r = larger(piece.begin - run.rows.begin, first); r < end; ++r) {
                                total += seen(r).probability;
                            }
                            store<T>(total, sums);
                        }
                    });
                }
                for (int64_t p = run.pieces.begin; p < run.pieces.end; ++p) {
                    const T* sums = buffers.of_run + (p - run.pieces.begin) * block_columns;
                    for (int64_t h = plan.holders_begin[p]; h < plan.holders_begin[p + 1]; ++h) {
                        const int64_t step = plan.holders[h];
                        if (plan.steps[step].end - plan.steps[step].begin == 1) {
                            T* target = pooled.at<T>(example, x, step) + token;
                            const T factor = static_cast<T>(plan.weights[step] / heads);
#pragma omp simd
                            for (int64_t c = 0; c < count; ++c) target[c] = factor * sums[c];
                        } else {
                            double* total = buffers.sums + step * block_columns;
#pragma omp simd
                            for (int64_t c = 0; c < count; ++c) total[c] += sums[c];
                        }
                    }
                }
            }
            for (int64_t s = 0; s < steps; ++s) {
                if (plan.steps[s].end - plan.steps[s].begin < 2) continue;
                T* target = pooled.at<T>(example, x, s) + token;
                const double factor = plan.weights[s] / heads, *total = buffers.sums + s * block_columns;
#pragma omp simd
                for (int64_t c = 0; c < count; ++c) target[c] = static_cast<T>(factor * total[c]);
            }
        }
    });
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

template <typename Element, typename T>
void backward(
    const View& grad, const View& q, const View& k, const View& lse, const SpanPlan* plans,
    const Visibility& visibility, const View& dq, const View& dk, const View& dlse, int threads) {
    using N = Number<Element, T>;
    const Sizes sizes = sizes_of<N>(q, k, plans, grad.sizes[3]);
    const Keys<Element, N> keys(k, plans, sizes, threads);
    const int64_t tasks = count_pieces(plans, sizes.batch) * sizes.kv_heads;
    const int64_t groups = grad.sizes[1], heads = q.sizes[1] / groups;
    const bool each = heads < sizes.group;  // the heads of a task have a gradient each
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
            scratch.take<T>(sizes.most_columns * (each ? sizes.group : 1)),
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
        const N *key_rows = keys.stacked(at.example, kv_head), *panels = keys.panels(at.example, kv_head);
        Sight<T>& sight = buffers.sight;
        sight.look(plan.columns, plan.column_count, at.example, piece);
        for (int64_t g = 0; g < (each ? sizes.group : 1); ++g) {
            T* gradient = buffers.gradient + g * sizes.most_columns;
            for (int64_t n = 0; n < sizes.most_columns; ++n) gradient[n] = 0;
            const int64_t x = (kv_head * sizes.group + g) / heads;
            column_gradient(grad, plan, at, x, heads, buffers.word_gradient, gradient);
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
                const T* of_columns = buffers.gradient + (each ? g * sizes.most_columns : 0) + n;
                const auto weigh = [&](int64_t c, auto seen) {
                    const Vector<T> gradient = load(of_columns + c);
                    for (int64_t r = first; r < last; r += pack<N>) {
                        Vector<T> weights[pack<N>]{};
                        for (int64_t e = 0; e < smaller(pack<N>, last - r); ++e) {
                            const Seen<T> found = seen(r + e);
                            const Vector<T> weight = found.probability * gradient;
                            T* total = dlse + (r + e) * lanes<T>;
                            store<T>(load(total) - weight, total);
                            weights[e] = weight * found.slope;
                        }
                        const int64_t row = r * block_columns;
                        N *plain = buffers.weights + row + c, *stacked = buffers.stacked_weights + row + c * pack<N>;
                        store_numbers<N>(weights, plain, block_columns, stacked);
                    }
                };
                sight.visit_vectors(n, rows, sizes.depth, panels + n * sizes.depth, buffers.lse + g * tokens, weigh);
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
    const View& pooled, int threads) {
    dispatch(q.dtype, [&](auto element, auto accumulator) {
        forward<decltype(element), decltype(accumulator)>(q, k, lse, plans, visibility, pooled, threads);
    });
}

void key_attention_forward(
    const View& q, const View& k, const View& lse, const SpanPlan* plans, const Visibility& visibility,
    const View& pooled, int threads) {
    dispatch(q.dtype, [&](auto element, auto accumulator) {
        forward_every_key<decltype(element), decltype(accumulator)>(q, k, lse, plans, visibility, pooled, threads);
    });
}

void span_attention_backward(
    const View& grad, const View& q, const View& k, const View& lse, const SpanPlan* plans,
    const Visibility& visibility, const View& dq, const View& dk, const View& dlse, int threads) {
    dispatch(q.dtype, [&](auto element, auto accumulator) {
        backward<decltype(element), decltype(accumulator)>(
            grad, q, k, lse, plans, visibility, dq, dk, dlse, threads);
    });
}

}  // namespace mold::MOLD_LEVEL
