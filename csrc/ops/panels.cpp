// SPDX-License-Identifier: Apache-2.0
#include "ops/panels.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <bit>
#include <limits>

#include "ops/partition.h"

namespace sparselt {
namespace {

constexpr int kLanes = 16;
constexpr int kMaxVectors = 4;
constexpr int kMaxLanes = kLanes * kMaxVectors;

// Lanes [begin, end) of a panel that lie one after the other in memory, from lane 0's place on.
struct Run {
  int begin;
  int end;
  int64_t offset;
};

uint64_t lane_bits(int begin, int end) {
  const uint64_t below_end = end == 64 ? ~uint64_t{0} : (uint64_t{1} << end) - 1;
  return below_end & ~((uint64_t{1} << begin) - 1);
}

// Makes the panels of a product, one after the other, in buffers of its own.
class PanelMaker {
 public:
  PanelMaker(const PanelSource& source, int64_t rows)
      : source_(source),
        area_(source.out_height * source.out_width),
        rows_(rows),
        tap_extra_(source.taps.size() + 1) {}

  // The panel of flat pixels [begin, end); valid until the next call. `image` becomes the image of
  // the first pixel, which offsets count from.
  Panel make(int64_t begin, int64_t end, float* y, int64_t* image) {
    *image = begin / area_;
    const int lanes = static_cast<int>(end - begin);
    place_lanes(begin, lanes);
    const int vectors = (lanes + kLanes - 1) / kLanes;
    make_loads(vectors);
    make_stores(vectors);
    return {source_.x + *image * source_.image_stride,
            source_.channel_stride,
            static_cast<int64_t>(source_.taps.size()),
            vectors,
            loads_.data(),
            extra_.data(),
            tap_extra_.data(),
            y + *image * rows_ * area_,
            area_,
            stores_.data(),
            static_cast<int>(stores_.size())};
  }

 private:
  void place_lanes(int64_t begin, int lanes) {
    load_runs_.clear();
    store_runs_.clear();
    const bool whole_images = source_.row_stride == source_.out_width;
    int64_t image = 0;
    int64_t pixel = begin % area_;
    for (int lane = 0; lane < lanes;) {
      const int64_t p = pixel / source_.out_width;
      const int64_t q = pixel % source_.out_width;
      const int64_t stretch = whole_images ? area_ - pixel : source_.out_width - q;
      const int end = static_cast<int>(std::min<int64_t>(lanes, lane + stretch));
      load_runs_.push_back(
          {lane, end, image * source_.image_stride + p * source_.row_stride + q - lane});
      if (lane == 0 || pixel == 0) {
        store_runs_.push_back({lane, end, image * rows_ * area_ + pixel - lane});
      }
      store_runs_.back().end = end;
      if (source_.bordered) place_rows(lane, end, p, q);
      pixel += end - lane;
      lane = end;
      if (pixel == area_) {
        pixel = 0;
        ++image;
      }
    }
  }

  void place_rows(int lane, int end, int64_t p, int64_t q) {
    for (; lane < end; ++lane) {
      row_[lane] = static_cast<int32_t>(p * source_.row_step);
      column_[lane] = static_cast<int32_t>(q);
      if (++q == source_.out_width) {
        q = 0;
        ++p;
      }
    }
  }

  // The lanes whose row and column under a tap lie inside x.
  uint64_t inside(const Tap& tap) const {
    if (!source_.bordered) return ~uint64_t{0};
    uint64_t bits = 0;
    for (int lane = 0; lane < kMaxLanes; ++lane) {
      const auto row = static_cast<uint32_t>(row_[lane] + tap.row_shift);
      const auto column = static_cast<uint32_t>(column_[lane] + tap.column_shift);
      const bool in = row < static_cast<uint32_t>(source_.height) &&
                      column < static_cast<uint32_t>(source_.width);
      bits |= uint64_t{in} << lane;
    }
    return bits;
  }

  void make_loads(int vectors) {
    loads_.clear();
    extra_.clear();
    for (size_t t = 0; t < source_.taps.size(); ++t) {
      const Tap& tap = source_.taps[t];
      const uint64_t valid = inside(tap);
      tap_extra_[t] = static_cast<int32_t>(extra_.size());
      size_t run = 0;
      for (int v = 0; v < vectors; ++v) {
        Piece first{0, static_cast<uint16_t>(v), 0};
        while (run > 0 && load_runs_[run].begin > v * kLanes) --run;
        for (; run < load_runs_.size() && load_runs_[run].begin < (v + 1) * kLanes; ++run) {
          const Piece piece = cut(load_runs_[run], v, valid, tap.offset);
          if (piece.mask == 0) continue;
          if (first.mask == 0) {
            first = piece;
          } else {
            extra_.push_back(piece);
          }
        }
        if (run > 0) --run;  // a run can reach into the next vector
        loads_.push_back(first);
      }
    }
    tap_extra_[source_.taps.size()] = static_cast<int32_t>(extra_.size());
  }

  void make_stores(int vectors) {
    stores_.clear();
    for (int v = 0; v < vectors; ++v) {
      for (const Run& run : store_runs_) {
        const Piece piece = cut(run, v, ~uint64_t{0}, 0);
        if (piece.mask != 0) stores_.push_back(piece);
      }
    }
  }

  static Piece cut(const Run& run, int vector, uint64_t valid, int64_t offset) {
    const int first = std::max(run.begin, vector * kLanes);
    const int last = std::min(run.end, (vector + 1) * kLanes);
    const uint64_t bits = first < last ? lane_bits(first, last) & valid : 0;
    return {static_cast<int32_t>(run.offset + offset + vector * kLanes),
            static_cast<uint16_t>(vector), static_cast<uint16_t>(bits >> (vector * kLanes))};
  }

  const PanelSource& source_;
  const int64_t area_;
  const int64_t rows_;
  std::vector<Run> load_runs_;
  std::vector<Run> store_runs_;
  std::vector<Piece> loads_;
  std::vector<Piece> extra_;
  std::vector<int32_t> tap_extra_;
  std::vector<Piece> stores_;
  int32_t row_[kMaxLanes] = {};
  int32_t column_[kMaxLanes] = {};
};

// Flat pixels and sections that one thread computes.
struct Share {
  Range pixels;
  Range sections;
};

Share share_of(int64_t part, int64_t parts, int64_t pixels, int64_t sections) {
  const int64_t vectors = (pixels + kLanes - 1) / kLanes;
  if (vectors >= parts * kMaxVectors || sections < parts) {
    return {even_columns(pixels, part, parts), {0, sections}};
  }
  return {{0, pixels}, {sections * part / parts, sections * (part + 1) / parts}};
}

void run_share(const Weight& weight, const PanelSource& source, float* y, const Epilogue& epilogue,
               const Share& share, float* scratch) {
  PanelMaker maker(source, weight.rows);
  const int64_t area = source.out_height * source.out_width;
  const int64_t vectors = (share.pixels.end - share.pixels.begin + kLanes - 1) / kLanes;
  const int64_t max_vectors = weight.kernel->tile_columns / kLanes;
  const int64_t panels = (vectors + max_vectors - 1) / max_vectors;
  for (int64_t i = 0; i < panels; ++i) {
    const int64_t begin = share.pixels.begin + vectors * i / panels * kLanes;
    const int64_t end =
        std::min(share.pixels.end, share.pixels.begin + vectors * (i + 1) / panels * kLanes);
    int64_t image = 0;
    PanelCall call{weight.sell, maker.make(begin, end, y, &image), epilogue, scratch,
                   scratch + (weight.sell.block_cols + 1) * kMaxLanes};
    if (epilogue.residual) call.epilogue.residual += image * weight.rows * area;
    weight.kernel->panel(call, share.sections);
  }
}

}  // namespace

void run_panels(const Weight& weight, const PanelSource& source, float* y,
                const Epilogue& epilogue) {
  const int64_t pixels = source.batch * source.out_height * source.out_width;
  if (pixels == 0 || weight.rows == 0) return;
  STD_TORCH_CHECK(kMaxLanes * std::max(source.image_stride, weight.rows * pixels / source.batch) <
                      std::numeric_limits<int32_t>::max(),
                  "x: images of this size need more than 32-bit offsets; split them");
  const int64_t stored =
      weight.sell.slice_height *
      weight.sell
          .slice_steps[weight.sell.block_slices[weight.sell.num_sections * weight.sell.num_blocks]];
  const int64_t threads =
      stored * pixels < kSerialWork ? 1 : int64_t{torch::stable::get_num_threads()};
  const int64_t scratch_floats = (weight.sell.block_cols + 1 + weight.rows) * kMaxLanes;
  const Tensor scratch = new_output({threads, scratch_floats});
  float* data = float_data(scratch);
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const Share share = share_of(part, threads, pixels, weight.sell.num_sections);
      run_share(weight, source, y, epilogue, share, data + part * scratch_floats);
    }
  };
  if (threads == 1) return run(0, 1);
  torch::stable::parallel_for(0, threads, 1, run);
}

}  // namespace sparselt
