// What a kernel, compiled as C++, asks of the machine that runs it (engine.cpp).
#pragma once
#include <cstddef>

struct Place {  // where a thread stands; the names follow Metal's attributes
  unsigned thread_position_in_grid[3], thread_position_in_threadgroup[3];
  unsigned threadgroup_position_in_grid[3], threadgroups_per_grid[3];
  unsigned threads_per_threadgroup[3], dispatch_threads_per_threadgroup[3], threads_per_grid[3];
  unsigned thread_index_in_threadgroup, thread_index_in_simdgroup;
  unsigned simdgroup_index_in_threadgroup, simdgroups_per_threadgroup;
};

enum : unsigned { ORDERS_THREADGROUP = 1, ORDERS_DEVICE = 2 };

extern "C" {
// Generated around the kernel: one thread's whole life.
void machine_kernel(void* const* buffers, const Place* at);

// Wait for the threadgroup, or for the simdgroup; `orders` says which memory is ordered.
void machine_barrier(bool simdgroup, unsigned orders, const char* file, int line);

// Bring a value of `size` <= 16 bytes to all lanes of the simdgroup: fills all[32][size] and
// the lane that calls, and returns the mask of the lanes that brought one.
unsigned machine_exchange(const char* op, const void* mine, void* all, size_t size, int* self,
                          const char* file, int line);

// The storage of one `threadgroup` declaration: a block of its own, so that its bounds are known.
void* machine_threadgroup(int id, const char* name, size_t size, size_t item);

// Report a fault of the calling thread. Does not return.
[[noreturn]] void machine_fault(const char* what, const char* file, int line);
}
