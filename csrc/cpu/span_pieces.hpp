#pragma once

#include <cstdint>
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

// One example's pieces as span attention walks them. Whatever the spans hold, they are cut to [0, Tq] and [0, Tk].
struct SpanPlan {
    const std::int32_t* columns;
    std::int64_t column_count;
    std::vector<Range> key_words;  // [M], of columns; none where every key is one
    std::vector<Range> pieces;     // of rows; only those that a step holds, ascending
    std::vector<Range> steps;      // [S], of pieces
    std::vector<double> weights;   // [S]: 1, or 1 / rows of the step for the mean
    std::vector<Run> runs;         // of all pieces
    std::vector<std::int64_t> holders, holders_begin;  // the steps that hold piece p are holders[holders_begin[p]] and on
};

// A plan for each example, of the tensors of `span_pieces`. Without key spans every key is a key word.
std::vector<SpanPlan> plan_spans(
    const View& row_spans, const View* key_spans, const View& row_piece, const View& row_start, const View& before,
    const View& columns, bool mean);

}  // namespace mold
