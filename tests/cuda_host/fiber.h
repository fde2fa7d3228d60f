// SPDX-License-Identifier: Apache-2.0
//
// Switching between stacks. ucontext's own switch asks the kernel for the signal mask each time,
// which would be most of a simulation's time; where we know the machine we switch ourselves.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__) && defined(__linux__)

// Keeps the caller's registers on its stack, its stack pointer in *from, and goes on at `to`.
extern "C" void cuda_host_switch(void** from, void* to);
asm(R"(
.text
.globl cuda_host_switch
.type cuda_host_switch, @function
cuda_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_host_switch, .-cuda_host_switch
)");

namespace cuda_host {

struct Context {
  void* stack_pointer = nullptr;
};

inline void make_context(Context& context, void* stack, size_t bytes, void (*enter)()) {
  // What the switch pops: six registers, then the address to go on at; the stack pointer at a
  // function's first instruction is 8 short of a multiple of 16.
  void** top = reinterpret_cast<void**>(static_cast<char*>(stack) + bytes - 64);
  top[0] = reinterpret_cast<void*>(enter);
  top[1] = nullptr;
  context.stack_pointer = top - 6;
  for (int i = 1; i <= 6; ++i) top[-i] = nullptr;
}
inline void switch_context(Context& from, Context& to) {
  cuda_host_switch(&from.stack_pointer, to.stack_pointer);
}

}  // namespace cuda_host

#else

#include <ucontext.h>

namespace cuda_host {

using Context = ucontext_t;

inline void make_context(Context& context, void* stack, size_t bytes, void (*enter)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, enter, 0);
}
inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }

}  // namespace cuda_host

#endif

namespace cuda_host {

// The address sanitizer must know which stack is in use, and forget what a stack held before.
inline void before_switch([[maybe_unused]] void** fake_stack, [[maybe_unused]] const void* stack,
                          [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake_stack, stack, bytes);
#endif
}
inline void after_switch([[maybe_unused]] void* fake_stack, [[maybe_unused]] const void** stack,
                         [[maybe_unused]] size_t* bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, stack, bytes);
#endif
}
inline void forget_stack([[maybe_unused]] void* stack, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack, bytes);
#endif
}

}  // namespace cuda_host
