// Switching stacks: 7 pushes and a return. (swapcontext asks the kernel each time: 100x slower.)
#pragma once
#include <cstddef>
#include <cstdint>

extern "C" {
void fiber_switch(void** save_stack_pointer, void* stack_pointer);
void fiber_begin();
}

#ifdef __APPLE__
#define FIBER_NAME(name) ".globl _" name "\n_" name ":\n"
#else
#define FIBER_NAME(name) ".globl " name "\n" name ":\n"
#endif

#if defined(__x86_64__)
__asm__(".text\n" FIBER_NAME("fiber_switch") R"(
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
)" FIBER_NAME("fiber_begin") R"(
  movq %r12, %rdi
  call *%r13
  ud2
)");
#elif defined(__aarch64__)
__asm__(".text\n.p2align 2\n" FIBER_NAME("fiber_switch") R"(
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)" FIBER_NAME("fiber_begin") R"(
  mov x0, x19
  blr x20
  brk #1
)");
#else
#error "write fiber_switch for this CPU"
#endif

// A stack on which fiber_switch starts `run(argument)`.
inline void* fiber_prepare(char* stack, size_t size, void (*run)(void*), void* argument) {
  void** top = (void**)((uintptr_t(stack) + size) & ~uintptr_t(15));
#if defined(__x86_64__)
  void** p = top - 15;  // fiber_begin finds the stack aligned to 16
  for (int i = 0; i < 15; i++) p[i] = nullptr;
  p[2] = (void*)run, p[3] = argument, p[6] = (void*)fiber_begin;  // r13, r12, return address
#else
  void** p = top - 20;
  for (int i = 0; i < 20; i++) p[i] = nullptr;
  p[0] = argument, p[1] = (void*)run, p[11] = (void*)fiber_begin;  // x19, x20, x30
#endif
  return p;
}

// The address sanitizer wants to know.
#ifdef SANITIZED
extern "C" void __sanitizer_start_switch_fiber(void**, const void*, size_t);
extern "C" void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
inline void fiber_leave(void** fake, const void* stack, size_t size) { __sanitizer_start_switch_fiber(fake, stack, size); }
inline void fiber_arrive(void* fake, const void** stack, size_t* size) { __sanitizer_finish_switch_fiber(fake, stack, size); }
#else
inline void fiber_leave(void**, const void*, size_t) {}
inline void fiber_arrive(void*, const void**, size_t*) {}
#endif
