// SPDX-License-Identifier: Apache-2.0
//
// Arrays that notice the touch of a neighbour: one end lies at a page that nobody may read or
// write, the other between bytes of 0xff (NaN as floats) that must stay as they are.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

namespace neon_test {

// The end that lies at a forbidden page.
enum class Edge { kFront, kBack };

template <class T>
class Guarded {
 public:
  Guarded() = default;

  // `size` elements of 0xff bytes.
  Guarded(size_t size, Edge edge) : size_(size) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t bytes = size * sizeof(T);
    inner_bytes_ = (bytes + page - 1) / page * page + page;  // a page of slack where bytes fit
    mapped_bytes_ = inner_bytes_ + 2 * page;
    void* mapped = mmap(nullptr, mapped_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) fail("mmap");
    mapped_ = static_cast<unsigned char*>(mapped);
    inner_ = mapped_ + page;
    if (mprotect(inner_, inner_bytes_, PROT_READ | PROT_WRITE) != 0) fail("mprotect");
    std::memset(inner_, 0xff, inner_bytes_);
    data_ = reinterpret_cast<T*>(edge == Edge::kFront ? inner_ : inner_ + inner_bytes_ - bytes);
  }

  Guarded(const std::vector<T>& values, Edge edge) : Guarded(values.size(), edge) {
    if (size_ > 0) std::memcpy(data_, values.data(), size_ * sizeof(T));
  }

  Guarded(Guarded&& other) noexcept { swap(other); }
  Guarded& operator=(Guarded&& other) noexcept {
    swap(other);
    return *this;
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() {
    if (mapped_) munmap(mapped_, mapped_bytes_);
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  size_t size() const { return size_; }
  T operator[](size_t i) const { return data_[i]; }

  // Whether all bytes around the array are as they were.
  bool intact() const {
    const auto* first = reinterpret_cast<const unsigned char*>(data_);
    const auto* last = reinterpret_cast<const unsigned char*>(data_ + size_);
    for (const unsigned char* at = inner_; at < first; ++at) {
      if (*at != 0xff) return false;
    }
    for (const unsigned char* at = last; at < inner_ + inner_bytes_; ++at) {
      if (*at != 0xff) return false;
    }
    return true;
  }

 private:
  void swap(Guarded& other) {
    std::swap(size_, other.size_);
    std::swap(inner_bytes_, other.inner_bytes_);
    std::swap(mapped_bytes_, other.mapped_bytes_);
    std::swap(mapped_, other.mapped_);
    std::swap(inner_, other.inner_);
    std::swap(data_, other.data_);
  }
  [[noreturn]] static void fail(const char* what) {
    std::perror(what);
    std::exit(2);
  }

  size_t size_ = 0;
  size_t inner_bytes_ = 0;
  size_t mapped_bytes_ = 0;
  unsigned char* mapped_ = nullptr;
  unsigned char* inner_ = nullptr;
  T* data_ = nullptr;
};

}  // namespace neon_test
