#include "level_kernels.hpp"
#include "span_rows.hpp"

// Span attention's forward where every key is a key word; formulas in mold_kernels/span_attention.py. Sums over a piece would
// be as many as scores: a task is a block of columns, with all rows, and adds up its columns of the result, and zeros for the
// keys up to the next block, which no row sees. Few rows take the keys as they lie, all heads of a key head at once.
namespace mold::MOLD_LEVEL {
namespace {

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
void forward(
    const View& q, const View& k, const View& lse, const SpanPlan* plans, const Visibility& visibility,
    const View& pooled, const View* first_rows, int threads) {
    using N = Number<Element, T>;
    Sizes sizes = sizes_of<N>(q, k, plans, pooled.sizes[3]);
    const int64_t groups = pooled.sizes[1], steps = pooled.sizes[2], heads = q.sizes[1] / groups;
    const bool maxima = plans[0].reduction == RowReduction::max;
    sizes.most_columns = block_columns;
    sizes.most_tokens = larger(sizes.most_tokens, run_rows);
    int64_t most_joined = 0, blocks = 0;
    for (int64_t b = 0; b < sizes.batch; ++b) {
        most_joined = larger(most_joined, plans[b].joined);
        blocks = larger(blocks, static_cast<int64_t>(plans[b].key_blocks.size()));
    }
    // Rows of keys are read as they lie where vectors can be.
    const bool plain = std::is_same_v<Element, N> && k.strides[3] == 1 && sizes.head_dim == sizes.width;

    struct Buffers {
        Sight<T> sight;
        N *q, *keys, *panels;
        T *products;       // of few rows: [heads, rows, block_columns]
        T *lse, *of_rows;  // [rows, block_columns], over heads, for maxima
        int64_t* targets;         // of each row: the row of the sums that it is added to
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
            scratch.take<T>(sizes.few ? of_keys * few_rows : 0),
            scratch.take<T>(sizes.most_tokens), scratch.take<T>(maxima ? sizes.most_tokens * block_columns : 0),
            scratch.take<int64_t>(sizes.most_tokens), {scratch.take<T>(run_rows * block_columns), first(run_rows)},
            {scratch.take<double>(most_joined * block_columns), first(most_joined)},
            scratch.take<KeyBlock<N>>(sizes.kv_heads)};
    };
    // The first columns are seen by the most rows.
    parallel(threads, blocks * sizes.batch, make, [&](int64_t task, Buffers& buffers) {
        const int64_t example = task % sizes.batch, index = task / sizes.batch;
        const SpanPlan& plan = plans[example];
        const int64_t last = static_cast<int64_t>(plan.key_blocks.size()) - 1;
        if (index > last) return;
        const Range keys = plan.key_blocks[index];
        const int64_t token = keys.begin, count = keys.end - token, padded = round_up(count, lanes<T>);
        const int64_t next = index < last ? plan.key_blocks[index + 1].begin : sizes.length;
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
        bool seen_by_few = false;
        for (const Run& run : plan.runs) {
            if (!sizes.few) break;
            sight.look(NeighbouringKeys{token}, count, example, run.rows);
            looked = &run;
            seen_by_few = seen_by_few || sight.begin < sight.columns;
        }
        const int64_t of_head = seen_by_few ? plan.rows() : 0;
        for (int64_t head = 0; seen_by_few && head < sizes.kv_heads; ++head) {
            N* row = buffers.q;
            for (int64_t g = 0; g < sizes.group; ++g) {
                for (const Run& run : plan.runs) {
                    for (int64_t t = run.rows.begin; t < run.rows.end; ++t, row += sizes.width) {
                        const Element* source = q.at<const Element>(example, head * sizes.group + g, t);
                        load_row(source, q.strides[3], sizes.head_dim, row, sizes.width);
                    }
                }
            }
            multiply_few<N>(
                sizes.group * of_head, padded, sizes.width, buffers.q, sizes.width, buffers.blocks[head].rows,
                buffers.blocks[head].row, buffers.products + head * sizes.group * of_head * block_columns, block_columns);
        }
        for (int64_t x = 0; x < groups; ++x) {
            const auto write = [&](int64_t step, const auto& columns) {
                std::int32_t* first = first_rows ? first_rows->at<std::int32_t>(example, x, step) + token : nullptr;
                T* target = pooled.at<T>(example, x, step);
                columns.write(count, plan.weights[step] / heads, target + token, first);
                for (int64_t key = 0; index == 0 && key < token; ++key) target[key] = 0;
                for (int64_t key = keys.end; key < next; ++key) target[key] = 0;
            };
            for (int64_t i = 0; i < plan.joined; ++i) buffers.of_steps.at(i).clear();
            int64_t before = 0;  // rows of earlier runs
            for (const Run& run : plan.runs) {
                if (looked != &run) sight.look(NeighbouringKeys{token}, count, example, run.rows);
                looked = &run;
                const int64_t pieces = run.pieces.end - run.pieces.begin;
                const bool seen_here = sight.begin < sight.columns;
                for (int64_t p = 0; p < pieces; ++p) of_run.at(p).clear();
                const int64_t of_all_rows = maxima ? sight.rows * block_columns : 0;
                for (int64_t i = 0; i < of_all_rows; ++i) buffers.of_rows[i] = 0;
                for (int64_t p = 0; p < pieces; ++p) {
                    const Range piece = plan.pieces[run.pieces.begin + p];
                    for (int64_t row = piece.begin; row < piece.end; ++row) {
                        const int64_t r = row - run.rows.begin;
                        buffers.targets[r] = maxima ? r : p;
                    }
                }
                for (int64_t head = x * heads; seen_here && head < (x + 1) * heads; ++head) {
                    load_entries(lse, example, head, run.rows, buffers.lse);
                    const T* products = buffers.products + (head * of_head + before) * block_columns;
                    Range seen = sight.template rows_seeing<N>(0);
                    if (!sizes.few) {
                        const Matrix<N> rows = rows_of<Element>(q, example, head, run.rows, sizes, buffers.q);
                        seen = sight.multiply_block(0, rows, sizes, buffers.blocks[head / sizes.group]);
                        products = sight.scores;
                    }
                    sight.add_block(
                        0, seen, products, buffers.lse, buffers.targets, maxima ? buffers.of_rows : of_run.values);
                }
                before += sight.rows;
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

}  // namespace

void key_attention_forward(
    const View& q, const View& k, const View& lse, const SpanPlan* plans, const Visibility& visibility,
    const View& pooled, const View* first, int threads) {
    dispatch(q.dtype, [&](auto element, auto accumulator) {
        forward<decltype(element), decltype(accumulator)>(q, k, lse, plans, visibility, pooled, first, threads);
    });
}

}  // namespace mold::MOLD_LEVEL
