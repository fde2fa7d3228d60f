// SPDX-License-Identifier: Apache-2.0
#include "jit/executable_memory.h"

#include <sys/mman.h>

#include <cstring>

namespace sparselt::jit {

ExecutableMemory::ExecutableMemory(const std::vector<uint8_t>& code) {
  if (code.empty()) return;
  void* memory =
      mmap(nullptr, code.size(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return;
  std::memcpy(memory, code.data(), code.size());
  if (mprotect(memory, code.size(), PROT_READ | PROT_EXEC) != 0) {
    munmap(memory, code.size());
    return;
  }
  data_ = static_cast<uint8_t*>(memory);
  size_ = code.size();
}

ExecutableMemory::~ExecutableMemory() {
  if (data_) munmap(data_, size_);
}

}  // namespace sparselt::jit
