// SPDX-License-Identifier: Apache-2.0
//
// A slice of up to 31 rows by one vector of x keeps a sum in each of 31 registers. For every column
// that the slice uses, x is loaded into the last register once; a stored value is then one
// instruction: a multiply-add that takes its second factor from memory for all lanes. That is 7
// bytes a value, and 7 a column and slice: what binds is how fast a core fetches instructions, and
// a wider tile, with a broadcast of its own and more multiply-adds a value, is more code for the
// same work (docs/kernels.md).
#include "jit/panel_code.h"

#include <algorithm>
#include <array>
#include <numeric>

#include "jit/emitter.h"

namespace sparselt::jit {
namespace {

constexpr int32_t kVector = 64;       // bytes
constexpr int32_t kFloat = 4;         // bytes
constexpr int32_t kHalfWindow = 128;  // units that a one-byte offset reaches, on either side
constexpr Zmm kX{31};
// A chunk is run for one vector of the panel after the other, so it should stay in the first-level
// instruction cache, of 32 KB on all CPUs that have these instructions.
constexpr size_t kChunkBytes = 28 << 10;

// A function's arguments, in the order of PanelFunction, and the registers that it keeps bases in.
// Offsets from a base in the middle of what it reaches take one byte.
constexpr Gpr kXArgument = Gpr::rdi;
constexpr Gpr kSumsArgument = Gpr::rsi;
constexpr Gpr kValuesArgument = Gpr::rdx;
constexpr Gpr kBias = Gpr::rcx;
constexpr std::array<Gpr, 2> kXBases{Gpr::r8, Gpr::r9};
constexpr std::array<Gpr, 2> kSumsBases{Gpr::r10, Gpr::r11};

struct Entry {
  int32_t column;
  int32_t lane;
  int32_t place;  // in the weight's values
};

// Addresses of an array of equal items by two bases with 256 items each in reach.
class TwoBases {
 public:
  TwoBases(std::array<Gpr, 2> bases, int32_t item) : bases_(bases), item_(item) {}

  // `first` is the item that most accesses lie behind; `from` points at item 0.
  void set(Emitter& code, Gpr from, int32_t first) {
    first_ = first;
    for (int32_t i = 0; i < 2; ++i) code.lea(bases_[index(i)], {from, middle(i) * item_});
  }
  Address at(int32_t item) const {
    const int32_t i = item < first_ + 2 * kHalfWindow ? 0 : 1;
    return {bases_[index(i)], (item - middle(i)) * item_};
  }

 private:
  static size_t index(int32_t i) { return static_cast<size_t>(i); }
  int32_t middle(int32_t i) const { return first_ + (2 * i + 1) * kHalfWindow; }

  std::array<Gpr, 2> bases_;
  int32_t item_;
  int32_t first_ = 0;
};

// Addresses of values, which are met nearly in the order that they lie in: the rows of a slice
// progress alike, but not in step. Three windows move along.
class ValueWindows {
 public:
  void set(Emitter& code, int32_t first) {
    for (size_t i = 0; i < windows_.size(); ++i) {
      windows_[i] = {kBases[i], first + (2 * static_cast<int32_t>(i) + 1) * kHalfWindow};
    }
    // The last one is the argument itself, so it is overwritten last.
    for (const Window& window : windows_) {
      code.lea(window.base, {kValuesArgument, (window.middle - first) * kFloat});
    }
  }
  Address at(Emitter& code, int32_t place) {
    for (const Window& window : windows_) {
      const int32_t offset = place - window.middle;
      if (offset >= -kHalfWindow && offset < kHalfWindow) return {window.base, offset * kFloat};
    }
    const auto by_middle = [](const Window& a, const Window& b) { return a.middle < b.middle; };
    const auto [rear, front] = std::minmax_element(windows_.begin(), windows_.end(), by_middle);
    if (place > front->middle) {
      const int32_t middle = std::max(front->middle + 2 * kHalfWindow, place - kHalfWindow + 1);
      code.add(rear->base, (middle - rear->middle) * kFloat);
      rear->middle = middle;
    }
    return {rear->base, (place - rear->middle) * kFloat};
  }

 private:
  struct Window {
    Gpr base;
    int32_t middle;
  };
  static constexpr std::array<Gpr, 3> kBases{Gpr::rax, Gpr::rdi, kValuesArgument};
  std::array<Window, 3> windows_{};
};

class Generator {
 public:
  explicit Generator(const SellView& weight)
      : weight_(weight), height_(static_cast<int32_t>(weight.slice_height)) {}

  // The slices of block `block` of section `section`, appended to `chunks`.
  void emit_block(int64_t section, int64_t block, std::vector<CodeChunk>* chunks) {
    const int32_t* slices = weight_.block_slices + section * weight_.num_blocks + block;
    first_row_ = lowest_row(slices[0], slices[1]);
    int32_t begin = slices[0];
    while (begin < slices[1]) {
      CodeChunk chunk{nullptr, static_cast<int64_t>(code_.size()), 0, begin, begin};
      open_chunk(weight_.slice_steps[begin] * height_);
      size_t longest = 0;
      while (chunk.last_slice < slices[1]) {
        const size_t before = code_.size();
        if (before - start_of(chunk) + longest > kChunkBytes && chunk.last_slice > begin) break;
        emit_slice(chunk.last_slice++, block == 0);
        longest = std::max(longest, code_.size() - before);
      }
      code_.ret();
      chunk.bytes = static_cast<int64_t>(code_.size() - start_of(chunk));
      begin = chunk.last_slice;
      chunks->push_back(chunk);
    }
  }

  const std::vector<uint8_t>& bytes() const { return code_.bytes(); }

 private:
  static size_t start_of(const CodeChunk& chunk) { return static_cast<size_t>(chunk.start); }

  int32_t lowest_row(int32_t first_slice, int32_t last_slice) const {
    int64_t lowest = weight_.rows;
    for (int32_t i = first_slice * height_; i < last_slice * height_; ++i) {
      if (weight_.slice_rows[i] >= 0) lowest = std::min<int64_t>(lowest, weight_.slice_rows[i]);
    }
    return static_cast<int32_t>(lowest);
  }

  void open_chunk(int32_t first_place) {
    x_.set(code_, kXArgument, 0);
    sums_.set(code_, kSumsArgument, first_row_);
    code_.add(kBias, (first_row_ + kHalfWindow) * kFloat);
    values_.set(code_, first_place);
  }

  void emit_slice(int32_t slice, bool is_first_block) {
    read_entries(slice);
    const int32_t* rows = weight_.slice_rows + slice * height_;
    std::array<bool, kMaxCodeRows> has_sum{};
    int32_t column = -1;
    for (const Entry& entry : entries_) {
      if (entry.column != column) {
        column = entry.column;
        code_.vmovaps(kX, x_.at(column));
      }
      const Zmm sum{static_cast<uint8_t>(entry.lane)};
      const Address value = values_.at(code_, entry.place);
      bool& is_started = has_sum[static_cast<size_t>(entry.lane)];
      if (is_started) {
        code_.vfmadd231ps_broadcast(sum, kX, value);
      } else {
        code_.vmulps_broadcast(sum, kX, value);
      }
      is_started = true;
    }
    for (int32_t lane = 0; lane < height_; ++lane) {
      if (rows[lane] < 0) continue;
      finish_row(lane, rows[lane], is_first_block, has_sum[static_cast<size_t>(lane)]);
    }
  }

  // The slice's values by column, without what fills rows up: a counting sort, which keeps the
  // values of a column in the order of their rows.
  void read_entries(int32_t slice) {
    const int32_t first = weight_.slice_steps[slice] * height_;
    const int32_t last = weight_.slice_steps[slice + 1] * height_;
    column_starts_.assign(static_cast<size_t>(weight_.block_cols) + 2, 0);
    for (int32_t place = first; place < last; ++place)
      ++column_starts_[weight_.columns[place] + 1u];
    std::partial_sum(column_starts_.begin(), column_starts_.end(), column_starts_.begin());
    entries_.resize(column_starts_[static_cast<size_t>(weight_.block_cols)]);
    for (int32_t lane = 0; lane < height_; ++lane) {
      for (int32_t place = first + lane; place < last; place += height_) {
        const int32_t column = weight_.columns[place];
        if (column == weight_.block_cols) break;
        entries_[column_starts_[static_cast<size_t>(column)]++] = {column, lane, place};
      }
    }
  }

  void finish_row(int32_t lane, int32_t row, bool is_first_block, bool has_sum) {
    if (!has_sum && !is_first_block) return;
    const Zmm sum{static_cast<uint8_t>(lane)};
    const Address place = sums_.at(row);
    if (!has_sum) code_.vxorps(sum, sum, sum);
    if (is_first_block) {
      code_.vaddps_broadcast(sum, sum, {kBias, (row - first_row_ - kHalfWindow) * kFloat});
    } else {
      code_.vaddps(sum, sum, place);
    }
    code_.vmovaps(place, sum);
  }

  const SellView& weight_;
  const int32_t height_;
  Emitter code_;
  TwoBases x_{kXBases, kVector};
  TwoBases sums_{kSumsBases, kVector};
  ValueWindows values_;
  int32_t first_row_ = 0;
  std::vector<Entry> entries_;
  std::vector<size_t> column_starts_;
};

}  // namespace

PanelCode::PanelCode(const SellView& weight) {
  if (weight.slice_height > kMaxCodeRows) return;
  Generator generator(weight);
  const int64_t blocks = weight.num_sections * weight.num_blocks;
  block_chunks_.assign(static_cast<size_t>(2 * blocks), 0);
  // In the order that a kernel runs them in.
  for (int64_t block = 0; block < weight.num_blocks; ++block) {
    for (int64_t section = 0; section < weight.num_sections; ++section) {
      const auto at = static_cast<size_t>(2 * (section * weight.num_blocks + block));
      block_chunks_[at] = static_cast<int32_t>(chunks_.size());
      generator.emit_block(section, block, &chunks_);
      block_chunks_[at + 1] = static_cast<int32_t>(chunks_.size());
    }
  }
  memory_ = ExecutableMemory(generator.bytes());
  for (CodeChunk& chunk : chunks_) {
    if (memory_.data()) {
      chunk.run = reinterpret_cast<PanelFunction>(memory_.data() + chunk.start);
    }
  }
  zeros_.assign(static_cast<size_t>(weight.rows), 0.0f);
}

CodeView PanelCode::view() const {
  if (!memory_.data()) return {};
  return {block_chunks_.data(), chunks_.data(), zeros_.data()};
}

}  // namespace sparselt::jit
