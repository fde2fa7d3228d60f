// SPDX-License-Identifier: Apache-2.0
//
// Says where the panels of a product or a convolution read and write (kernels.h). Knows no torch.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels.h"

namespace sparselt {

constexpr int kPanelLanes = 16;  // floats a vector of a panel
constexpr int kMaxPanelVectors = 16;
constexpr int kMaxPanelLanes = kPanelLanes * kMaxPanelVectors;
constexpr uint32_t kNoPeriod = UINT32_MAX;  // of rows that follow one another

// A filter position: what it adds to the place in x of an output pixel, and to its row and column.
struct Tap {
  int64_t offset;
  int32_t row_shift;
  int32_t column_shift;
};

// Where output pixel (image, p, q) finds the x of channel c under a tap, from the start of x on:
//   image * image_stride + c * channel_stride + p * row_stride + q + tap.offset
// With `bordered`, row p * row_step + row_shift and column q + column_shift must lie in the
// height x width of x; elsewhere x counts as zero. A matrix (K, N) is one image of one row.
struct PanelSource {
  int64_t batch;
  int64_t image_stride;
  int64_t channel_stride;
  int64_t row_stride;
  int64_t out_height;
  int64_t out_width;
  int64_t row_step;
  int64_t height;
  int64_t width;
  bool bordered;
  std::vector<Tap> taps;
  // Sections of the weight come in as many groups of equal number, each of which has channels of
  // its own, `group_stride` floats after those of the one before.
  int64_t groups = 1;
  int64_t group_stride = 0;
};

// Lanes [begin, end) of a panel that lie one after the other in memory, from lane 0's place on.
struct Run {
  int begin;
  int end;
  int64_t offset;
};

// Lanes [begin, end) of a vector.
inline unsigned lane_bits(int begin, int end) { return (1u << end) - (1u << begin); }
constexpr unsigned kAllLanes = (1u << kPanelLanes) - 1;

// Makes the panels of a product, one after the other, in buffers of its own.
class PanelMaker {
 public:
  PanelMaker(const PanelSource& source, int64_t rows)
      : source_(source),
        area_(source.out_height * source.out_width),
        rows_(rows),
        tap_extra_(source.taps.size() + 1) {}

  // The panel of flat pixels [begin, end); valid until the next call. Its x and y are still to be
  // told, by `point`. Two panels of as many pixels differ only if begin % (out_height * out_width)
  // does.
  Panel make(int64_t begin, int64_t end) {
    const int lanes = static_cast<int>(end - begin);
    place_lanes(begin, lanes);
    const int vectors = (lanes + kPanelLanes - 1) / kPanelLanes;
    make_loads(vectors);
    make_stores(vectors);
    const PanelRows stored{area_, kNoPeriod, stores_.data(), static_cast<int>(stores_.size())};
    return {nullptr,
            source_.channel_stride,
            static_cast<int64_t>(source_.taps.size()),
            vectors,
            loads_.data(),
            extra_.data(),
            tap_extra_.data(),
            nullptr,
            0,
            nullptr,
            stored,
            stored,
            {}};
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

  // The lanes of a vector whose row and column under a tap lie inside x.
  unsigned inside(const Tap& tap, int vector) const {
    if (!source_.bordered) return kAllLanes;
    unsigned bits = 0;
    for (int lane = 0; lane < kPanelLanes; ++lane) {
      const int at = vector * kPanelLanes + lane;
      const auto row = static_cast<uint32_t>(row_[at] + tap.row_shift);
      const auto column = static_cast<uint32_t>(column_[at] + tap.column_shift);
      const bool in = row < static_cast<uint32_t>(source_.height) &&
                      column < static_cast<uint32_t>(source_.width);
      bits |= unsigned{in} << lane;
    }
    return bits;
  }

  void make_loads(int vectors) {
    loads_.clear();
    extra_.clear();
    for (size_t t = 0; t < source_.taps.size(); ++t) {
      const Tap& tap = source_.taps[t];
      tap_extra_[t] = static_cast<int32_t>(extra_.size());
      size_t run = 0;
      for (int v = 0; v < vectors; ++v) {
        Piece first{0, static_cast<uint16_t>(v), 0};
        const unsigned valid = inside(tap, v);
        while (run > 0 && load_runs_[run].begin > v * kPanelLanes) --run;
        for (; run < load_runs_.size() && load_runs_[run].begin < (v + 1) * kPanelLanes; ++run) {
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
        const Piece piece = cut(run, v, kAllLanes, 0);
        if (piece.mask != 0) stores_.push_back(piece);
      }
    }
  }

  static Piece cut(const Run& run, int vector, unsigned valid, int64_t offset) {
    const int first = std::max(run.begin - vector * kPanelLanes, 0);
    const int last = std::min(run.end - vector * kPanelLanes, kPanelLanes);
    const unsigned bits = first < last ? lane_bits(first, last) & valid : 0;
    return {static_cast<int32_t>(run.offset + offset + vector * kPanelLanes),
            static_cast<uint16_t>(vector), static_cast<uint16_t>(bits)};
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
  int32_t row_[kMaxPanelLanes] = {};
  int32_t column_[kMaxPanelLanes] = {};
};

// Where the first tap of an output pixel finds channel 0 of x, in floats from the start of x on.
inline int64_t first_place(const PanelSource& source, int64_t pixel) {
  const int64_t area = source.out_height * source.out_width;
  const int64_t row = pixel % area / source.out_width;
  return pixel / area * source.image_stride + row * source.row_stride + pixel % source.out_width +
         source.taps[0].offset;
}

// Points the panel of a product of `rows` rows that begins at flat pixel `begin` at its x and y,
// and returns the image of that pixel, which offsets count from.
inline int64_t point(const PanelSource& source, int64_t rows, int64_t begin, const float* x,
                     float* y, Panel* panel) {
  const int64_t area = source.out_height * source.out_width;
  const int64_t image = begin / area;
  panel->x = x + image * source.image_stride;
  panel->y = y + image * rows * area;
  return image;
}

}  // namespace sparselt
