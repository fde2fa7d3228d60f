// SPDX-License-Identifier: Apache-2.0
#include "ops/code_table.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>

#include <array>
#include <limits>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>

namespace sparselt {
namespace {

constexpr size_t kStructure = 4;  // the parts before `values`, which code does not depend on

struct Key {
  uintptr_t slice_steps;
  std::array<int64_t, 4> sizes;  // rows, cols, slice_height, block_cols
  bool operator<(const Key& other) const {
    return std::tie(slice_steps, sizes) < std::tie(other.slice_steps, other.sizes);
  }
};

struct Entry {
  std::array<const void*, kStructure> addresses;
  Parts memory;  // of the structure; not the tensors themselves, which Python is to see die
  std::shared_ptr<const jit::PanelCode> code;
};

struct Table {
  std::mutex mutex;
  std::map<Key, Entry> entries;
};

// Never destroyed: at exit torch may be gone before the tensors in it.
Table& table() {
  static auto* const the_table = new Table;
  return *the_table;
}

uintptr_t address_of(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
}

// An empty tensor that keeps another one's memory alive. A view would not do: it has a reference to
// its base.
Tensor hold_memory(const Tensor& tensor) {
  const int64_t size = 0;
  const int64_t stride = 1;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(tensor.get(), 1, &size, &stride, 0, &handle));
  return Tensor(handle);
}

// The entries of a weight: one, or more where the same parts were given with several shapes.
auto entries_at(Table& all, uintptr_t slice_steps) {
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  return std::pair(all.entries.lower_bound(Key{slice_steps, {}}),
                   all.entries.upper_bound(Key{slice_steps, {kMost, kMost, kMost, kMost}}));
}

}  // namespace

std::shared_ptr<const jit::PanelCode> code_for(const Parts& parts, const SellView& view) {
  const Key key{address_of(parts[1]), {view.rows, view.cols, view.slice_height, view.block_cols}};
  const std::array<const void*, kStructure> addresses{view.block_slices, view.slice_steps,
                                                      view.slice_rows, view.columns};
  Table& all = table();
  {
    const std::lock_guard lock(all.mutex);
    const auto found = all.entries.find(key);
    if (found != all.entries.end() && found->second.addresses == addresses) {
      return found->second.code;
    }
  }
  Entry made{addresses, {}, std::make_shared<const jit::PanelCode>(view)};
  for (size_t i = 0; i < kStructure; ++i) made.memory.push_back(hold_memory(parts[i]));
  const std::lock_guard lock(all.mutex);
  return all.entries.insert_or_assign(key, std::move(made)).first->second.code;
}

void release_code(uintptr_t slice_steps) {
  Table& all = table();
  std::map<Key, Entry> released;  // destroyed after the lock
  const std::lock_guard lock(all.mutex);
  const auto [first, last] = entries_at(all, slice_steps);
  for (auto entry = first; entry != last;) released.insert(all.entries.extract(entry++));
}

size_t code_bytes(uintptr_t slice_steps) {
  Table& all = table();
  const std::lock_guard lock(all.mutex);
  const auto [first, last] = entries_at(all, slice_steps);
  size_t bytes = 0;
  for (auto entry = first; entry != last; ++entry) bytes += entry->second.code->bytes();
  return bytes;
}

}  // namespace sparselt
