#include "span_pieces.hpp"
#include "attention_rows.hpp"
#include "level_kernels.hpp"

// Formulas in mold_kernels/span_attention.py. A task is a piece of the rows: forward with all heads, backward with the
// heads that share a key head. The key words' columns are gathered and transposed once, so products are [rows, columns]
// with vectors over columns: rows are read entry by entry as they lie. The columns that a row sees are neighbours.
// Where every key is a key word, sums over a piece would be as many as scores: forward a task is a block of columns then,
// with all rows, and adds up its columns of the result. Few rows take the keys as they lie.
namespace mold::MOLD_LEVEL {
namespace {

// Rows of numbers are `width` wide, and of sums `sum_width`; their products have `depth` numbers. most_tokens are whole
// packs, most_columns whole blocks.
struct Sizes {
    int64_t batch, kv_heads, group, length, head_dim, depth, width, sum_width, most_tokens, most_columns, key_words;
    bool few;  // rows, of the heads that share a key head
};

template <typename N>
Sizes sizes_of(const View& q, const View& k, const SpanPlan* plans, int64_t key_words) {
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
        for (int64_t n = columns; n < round_up(columns, lanes<T>); ++n) tokens[n] = INT32_MAX;
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

    // Products of the rows of q that see any of the block's columns with these; then visit(c, seen) for each of its
    // vectors, where seen(r) is what row r has of the columns from n + c on: a probability of 0 where hidden.
    template <typename N, typename Visit>
    void visit_vectors(
        int64_t n, Matrix<N> q, const Sizes& sizes, const KeyBlock<N>& keys, const T* lse, const Visit& visit) {
        const int64_t first = first_row<N>(n), last = last_row<N>(n);
        const int64_t width = smaller(block_columns, round_up(columns - n, lanes<T>));
        if (first == last) return;
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
        const bool open =
            n + width <= columns && lasts[first] >= tokens[n + width - 1] && firsts[last - 1] <= tokens[n];
        if (open) {
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

// Keeps `value` where it is more than `best`, and where it is NaN, and from which row it is.
template <typename T, typename Row>
inline void keep_more(T value, Row row, T& best, std::int32_t& first) {
    const bool more = value > best || value != value;
    first = more ? static_cast<std::int32_t>(row) : first;
    best = more ? value : best;
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

// The keys from `first` on.
struct NeighbouringKeys {
    int64_t first;
    int64_t operator[](int64_t n) const { return first + n; }
};

// A block's columns of the rows of one run, or of one step: sums, or maxima and the rows that have them first.
template <typename T>
struct Columns {
    T* values;
    std::int32_t* first;  // null of sums

    Columns at(int64_t index) const {
        return {values + index * block_columns, first ? first + index * block_columns : nullptr};
    }
    void clear() const {
        for (int64_t c = 0; c < block_columns; ++c) values[c] = 0;
        for (int64_t c = 0; first && c < block_columns; ++c) first[c] = -1;
    }
    template <typename Source>
    void include(const Columns<Source>& other) const {
        if (first) {
#pragma omp simd
            for (int64_t c = 0; c < block_columns; ++c) {
                keep_more(static_cast<T>(other.values[c]), other.first[c], values[c], first[c]);
            }
        } else {
#pragma omp simd
            for (int64_t c = 0; c < block_columns; ++c) values[c] += other.values[c];
        }
    }
    void include_row(const T* row, int64_t index) const {
#pragma omp simd
        for (int64_t c = 0; c < block_columns; ++c) keep_more(row[c], index, values[c], first[c]);
    }
    template <typename Target>
    void write(int64_t count, double factor, Target* target, std::int32_t* target_first) const {
        const T times = static_cast<T>(factor);
#pragma omp simd
        for (int64_t c = 0; c < count; ++c) target[c] = static_cast<Target>(times * values[c]);
        for (int64_t c = 0; first && target_first && c < count; ++c) target_first[c] = first[c];
    }
};

template <typename Element, typename T>
void forward_every_key(
    const View& q, const View& k, const View& lse, const SpanPlan* plans, const Visibility& visibility,
    const View& pooled, const View* first_rows, int threads) {
    using N = Number<Element, T>;
    Sizes sizes = sizes_of<N>(q, k, plans, pooled.sizes[3]);
    const int64_t groups = pooled.sizes[1], steps = pooled.sizes[2], heads = q.sizes[1] / groups;
    const int64_t blocks = sizes.most_columns / block_columns;
    const bool maxima = plans[0].reduction == RowReduction::max;
    sizes.most_columns = block_columns;
    sizes.most_tokens = larger(sizes.most_tokens, run_rows);
    int64_t most_joined = 0;
    for (int64_t b = 0; b < sizes.batch; ++b) most_joined = larger(most_joined, plans[b].joined);
    // Rows of keys are read as they lie where vectors can be.
    const bool plain = std::is_same_v<Element, N> && k.strides[3] == 1 && sizes.head_dim == sizes.width;

    struct Buffers {
        Sight<T> sight;
        N *q, *keys, *panels;
        T *lse, *of_rows;  // [rows, block_columns], over heads, for maxima
        Columns<T> of_run;        // of each piece
        Columns<double> of_steps;  // of those that several pieces make up
        KeyBlock<N>* blocks;      // of each key head
    };
    const auto make = [&](Scratch& scratch) {
        const int64_t of_keys = sizes.kv_heads * block_columns;
        const auto first = [&](int64_t count) {
            return maxima ? scratch.take<std::int32_t>(count * block_columns) : nullptr;
        };
        return Buffers{
            Sight<T>(scratch, sizes, visibility), scratch.take<N>(sizes.most_tokens * sizes.width),
            scratch.take<N>(of_keys * sizes.width), scratch.take<N>(sizes.few ? 0 : of_keys * sizes.depth),
            scratch.take<T>(sizes.most_tokens), scratch.take<T>(maxima ? sizes.most_tokens * block_columns : 0),
            {scratch.take<T>(run_rows * block_columns), first(run_rows)},
            {scratch.take<double>(most_joined * block_columns), first(most_joined)},
            scratch.take<KeyBlock<N>>(sizes.kv_heads)};
    };
    // The first columns are seen by the most rows.
    parallel(threads, blocks * sizes.batch, make, [&](int64_t task, Buffers& buffers) {
        const int64_t example = task % sizes.batch, n = task / sizes.batch * block_columns;
        const SpanPlan& plan = plans[example];
        const int64_t count = smaller(block_columns, plan.column_count - n), padded = round_up(count, lanes<T>);
        if (count <= 0) return;
        const int64_t token = plan.key_runs[0].begin + n;
        for (int64_t head = 0; head < sizes.kv_heads; ++head) {
            N *rows = buffers.keys + head * block_columns * sizes.width, *panel = nullptr;
            KeyBlock<N>& block = buffers.blocks[head];
            block = {nullptr, rows, sizes.width};
            if (plain && count == padded) {
                block = {nullptr, k.at<const N>(example, head, token), k.strides[2]};
            } else {
                for (int64_t c = 0; c < padded; ++c) {
                    const Element* key = k.at<const Element>(example, head, token + smaller(c, count - 1));
                    load_row(key, k.strides[3], c < count ? sizes.head_dim : 0, rows + c * sizes.width, sizes.width);
                }
            }
            if (sizes.few) continue;
            panel = buffers.panels + head * block_columns * sizes.depth;
            transpose<N, block_columns>(block.rows, padded, sizes.depth, block.row, panel);
            block.panel = panel;
        }
        Sight<T>& sight = buffers.sight;
        const Columns<T>& of_run = buffers.of_run;
        const Run* looked = nullptr;
        for (int64_t x = 0; x < groups; ++x) {
            const auto write = [&](int64_t step, const auto& columns) {
                std::int32_t* first = first_rows ? first_rows->at<std::int32_t>(example, x, step) + token : nullptr;
                columns.write(count, plan.weights[step] / heads, pooled.at<T>(example, x, step) + token, first);
            };
            for (int64_t i = 0; i < plan.joined; ++i) buffers.of_steps.at(i).clear();
            for (const Run& run : plan.runs) {
                if (looked != &run) sight.look(NeighbouringKeys{token}, count, example, run.rows);
                looked = &run;
                const int64_t pieces = run.pieces.end - run.pieces.begin;
                const bool seen_here = sight.begin < sight.columns;
                const int64_t first = seen_here ? sight.template first_row<N>(0) : 0;
                const int64_t last = seen_here ? sight.template last_row<N>(0) : 0;
                for (int64_t p = 0; p < pieces; ++p) of_run.at(p).clear();
                const int64_t of_all_rows = maxima ? sight.rows * block_columns : 0;
                for (int64_t i = 0; i < of_all_rows; ++i) buffers.of_rows[i] = 0;
                const auto add = [&](int64_t c, auto seen) {
                    T* sums = of_run.values + c;
                    for (int64_t p = run.pieces.begin; p < run.pieces.end; ++p, sums += block_columns) {
                        const Range piece = plan.pieces[p];
                        Vector<T> total = load(sums);
                        const int64_t end = smaller(piece.end - run.rows.begin, last);
                        for (int64_t r = larger(piece.begin - run.rows.begin, first); r < end; ++r) {
                            total += seen(r).probability;
                        }
                        store<T>(total, sums);
                    }
                };
                const auto add_to_rows = [&](int64_t c, auto seen) {
                    for (int64_t r = first; r < last; ++r) {
                        T* total = buffers.of_rows + r * block_columns + c;
                        store<T>(load(total) + seen(r).probability, total);
                    }
                };
                for (int64_t head = x * heads; first < last && head < (x + 1) * heads; ++head) {
                    const Matrix<N> rows = rows_of<Element>(q, example, head, run.rows, sizes, buffers.q);
                    const KeyBlock<N>& block = buffers.blocks[head / sizes.group];
                    load_entries(lse, example, head, run.rows, buffers.lse);
                    if (maxima) {
                        sight.visit_vectors(0, rows, sizes, block, buffers.lse, add_to_rows);
                    } else {
                        sight.visit_vectors(0, rows, sizes, block, buffers.lse, add);
                    }
                }
                for (int64_t p = run.pieces.begin; p < run.pieces.end; ++p) {
                    const Columns<T> of_piece = of_run.at(p - run.pieces.begin);
                    const Range piece = plan.pieces[p];
                    for (int64_t row = piece.begin; maxima && row < piece.end; ++row) {
                        of_piece.include_row(buffers.of_rows + (row - run.rows.begin) * block_columns, row);
                    }
                    for (int64_t h = plan.holders_begin[p]; h < plan.holders_begin[p + 1]; ++h) {
                        const int64_t step = plan.holders[h], slot = plan.slots[step];
                        if (slot < 0) {
                            write(step, of_piece);
                        } else {
                            buffers.of_steps.at(slot).include(of_piece);
                        }
                    }
                }
            }
            for (int64_t s = 0; s < steps; ++s) {
                if (plan.slots[s] >= 0) {
                    write(s, buffers.of_steps.at(plan.slots[s]));
                } else if (plan.steps[s].begin == plan.steps[s].end) {
                    of_run.clear();
                    write(s, of_run);
                }
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

void key_attention_forward(
    const View& q, const View& k, const View& lse, const SpanPlan* plans, const Visibility& visibility,
    const View& pooled, const View* first, int threads) {
    dispatch(q.dtype, [&](auto element, auto accumulator) {
        forward_every_key<decltype(element), decltype(accumulator)>(q, k, lse, plans, visibility, pooled, first, threads);
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
