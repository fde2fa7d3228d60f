// SPDX-License-Identifier: Apache-2.0
//
// Memory that is written first and executed afterwards, never both at the same time.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <utility>
#include <vector>

namespace sparselt::jit {

class ExecutableMemory {
 public:
  ExecutableMemory() = default;
  // Holds a copy of `code`, or nothing where the system refuses memory that may be executed.
  explicit ExecutableMemory(const std::vector<uint8_t>& code);
  ExecutableMemory(ExecutableMemory&& other) noexcept { swap(other); }
  ExecutableMemory& operator=(ExecutableMemory&& other) noexcept {
    swap(other);
    return *this;
  }
  ~ExecutableMemory();

  const uint8_t* data() const { return data_; }  // null where it holds nothing
  size_t size() const { return size_; }

 private:
  void swap(ExecutableMemory& other) {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }

  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace sparselt::jit
