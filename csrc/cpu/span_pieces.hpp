#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "view.hpp"

namespace mold {

struct Range {
    std::int64_t begin, end;
};

// Fills the seven tensors of mold_kernels/span_pieces.py, which says what they are, for int32 row_spans [B, S, 2] and
// key_spans [B, M, 2]; no row piece has more than `rows` rows. All are contiguous int32.
void span_pieces(
    const View& row_spans, const View& key_spans, std::int64_t rows, const View& row_piece, const View& row_start,
    const View& key_piece, const View& key_first, const View& before, const View& columns, const View& column_piece);

// Pieces that follow each other without a gap, and their rows.
struct Run {
    Range pieces, rows;
};

// Rows of a run of several pieces: enough to hide the cost of a column block's keys, few enough to stay in the cache.
constexpr std::int64_t run_rows = 64;

// Columns that are multiplied at once: their products with a block's rows fit the L2 cache. Even, as packs are.
constexpr std::int64_t block_columns = 64;

enum class RowReduction { sum, mean, max };

// Throws std::invalid_argument for any other name than "sum", "mean" and "max".
RowReduction row_reduction_named(const std::string& name);

// One example's spans as span attention walks them. Whatever they hold, they are cut to [0, Tq] and [0, Tk].
struct SpanPlan {
    std::vector<Range> key_runs;        // of keys: the columns, ascending
    std::vector<std::int32_t> columns;  // the keys in those; none where the plan is of every key and to be short
    std::int64_t column_count = 0;
    std::vector<Range> key_words;  // [M], of columns; none where every key is one
    std::vector<Range> key_blocks; // where every key is one: the keys of each block of columns; at least one block
    std::vector<Range> pieces;     // of rows; only those that a step holds, ascending
    std::vector<Range> steps;      // [S], of pieces
    std::vector<std::int64_t> slots;  // [S]: which of the `joined` steps that several pieces make up it is, or -1
    std::int64_t joined = 0;
    std::vector<double> weights;   // [S]: 1, or 1 / rows of the step for the mean
    std::vector<Run> runs;         // of all pieces
    std::vector<std::int64_t> holders, holders_begin;  // the steps that hold piece p are holders[holders_begin[p]] and on
    RowReduction reduction = RowReduction::sum;

    std::int64_t rows() const;  // of all pieces
};

// mask bool [B, Tk], null where nothing is padding: no column is a key of padding and, where attention is causal, no piece has
// a row at the position of one. first int32 [B]: the positions of the first rows, null where those are 0.
struct Padding {
    const View *mask, *first;
    bool causal;
};

// A plan for each example of int32 row_spans [B, S, 2], of Tq rows in pieces of at most piece_rows, and key_spans [B, M, 2]
// of Tk keys. With every_key the keys in any span are key words, each by itself.
struct SpanSizes {
    std::int64_t rows, keys, piece_rows;
};
std::vector<SpanPlan> plan_spans(
    const View& row_spans, const View& key_spans, bool every_key, const SpanSizes& sizes, const Padding& padding,
    RowReduction reduction, bool list_columns);

}  // namespace mold
