// The machine's state, shared by engine.cpp and trace.cpp. Neither is ever instrumented: only the
// kernel's own accesses count.
#pragma once
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "machine.h"

constexpr unsigned SIMD = 32, MAX_THREADS = 1024, MAX_SHARED = 32768, GUARD = 4096;
constexpr unsigned char POISON = 0xFF;  // NaN in every float type

enum Kind : unsigned { INPUT, POISONED_OUTPUT, FILLED_OUTPUT };
struct Buffer {
  std::string name;
  Kind kind;
  size_t item, size;                  // bytes
  std::vector<unsigned char> view;    // per item: 1 where the array has an element; empty: all
  std::vector<unsigned char> before;  // the input's bytes
  unsigned char *block, *data;        // data lies GUARD bytes into block
};

struct Shared {  // a threadgroup declaration's storage
  int id;
  std::string name;
  size_t item, size;
  unsigned char* data;
};

enum State : unsigned char { READY, AT_EXCHANGE, AT_SIMD_BARRIER, AT_BARRIER, DONE };
struct Lane {
  void *stack_pointer, *fake_stack;
  char* stack;
  State state;
  unsigned orders, size;
  const char *op, *file;
  int line;
  Place at;
  alignas(16) unsigned char gift[16];
};

struct Simdgroup {
  unsigned present;
  alignas(16) unsigned char gifts[SIMD * 16];
  unsigned epoch[3];  // simdgroup barriers passed, by the memory they order
};

struct Machine {
  std::vector<Buffer> buffers;
  std::vector<void*> data;  // of each buffer, what the kernel is given
  std::vector<Shared> shared;
  std::vector<Lane> lanes;
  std::vector<Simdgroup> simdgroups;
  Lane* current = nullptr;  // null while the engine itself runs
  unsigned threads = 0, group = 0;
  unsigned epoch[3] = {};  // threadgroup barriers passed, by the memory they order
  size_t stack_size = 0, shared_size = 0;
  void *main_stack_pointer = nullptr, *main_fake_stack = nullptr;
  const void* main_stack = nullptr;
  size_t main_stack_size = 0;
};
extern Machine machine;

// One line on standard error, and the end.
[[noreturn]] void fault(const char* format, ...);

// What trace.cpp, linked in traced builds only, puts here before main.
struct Trace {
  void (*start)();
  void (*threadgroup_memory)(const Shared&);
  void (*threadgroup_ends)();
  void (*report)(FILE*);
};
extern const Trace* trace;
