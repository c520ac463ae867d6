// Runs one dispatch: reads it from standard input, writes the outputs to standard output.
//
// Every Metal thread is a fiber on one thread of the CPU. A lane runs until it meets a barrier or a
// simdgroup function; when all lanes it waits for have come, they go on. The order in which lanes,
// simdgroups and threadgroups take turns is a parameter, so that a missing barrier shows as a
// different result. Exit codes: 0, or 3 with one line on standard error.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <sys/mman.h>

#include "engine.h"
#include "fiber.h"

Machine machine;
const Trace* trace = nullptr;
static Machine& m = machine;
enum Order : unsigned { ASCENDING, DESCENDING, RANDOM };
static unsigned order;
static uint64_t randomness;

[[noreturn]] void fault(const char* format, ...) {
  va_list args;
  va_start(args, format);
  fputs("fault: ", stderr);
  vfprintf(stderr, format, args);
  fputc('\n', stderr);
  fflush(stderr);
  _Exit(3);
}

[[noreturn]] void machine_fault(const char* what, const char* file, int line) {
  const unsigned* p = m.current->at.thread_position_in_grid;
  fault("%s:%d: %s; thread (%u, %u, %u)", file, line, what, p[0], p[1], p[2]);
}

// ---- fibers
static void to_engine(Lane* lane, bool last) {
  m.current = nullptr;
  fiber_leave(last ? nullptr : &lane->fake_stack, m.main_stack, m.main_stack_size);
  fiber_switch(&lane->stack_pointer, m.main_stack_pointer);
  fiber_arrive(lane->fake_stack, nullptr, nullptr);
}

static void to_lane(Lane* lane) {
  m.current = lane;
  fiber_leave(&m.main_fake_stack, lane->stack, m.stack_size);
  fiber_switch(&m.main_stack_pointer, lane->stack_pointer);
  fiber_arrive(m.main_fake_stack, nullptr, nullptr);
}

static void live(Lane* lane) {
  fiber_arrive(nullptr, &m.main_stack, &m.main_stack_size);
  machine_kernel(m.data.data(), &lane->at);
  lane->state = DONE;
  to_engine(lane, true);
}

static void wait(State state, const char* op, const char* file, int line) {
  Lane* lane = m.current;
  lane->state = state, lane->op = op, lane->file = file, lane->line = line;
  to_engine(lane, false);
}

// ---- what kernels call
void machine_barrier(bool simdgroup, unsigned orders, const char* file, int line) {
  m.current->orders = orders;
  if (simdgroup) wait(AT_SIMD_BARRIER, "simdgroup_barrier", file, line);
  else wait(AT_BARRIER, "threadgroup_barrier", file, line);
}

unsigned machine_exchange(const char* op, const void* mine, void* all, size_t size, int* self,
                          const char* file, int line) {
  Lane* lane = m.current;
  memcpy(lane->gift, mine, lane->size = unsigned(size));
  wait(AT_EXCHANGE, op, file, line);
  const Simdgroup& g = m.simdgroups[lane->at.simdgroup_index_in_threadgroup];
  for (unsigned i = 0; i < SIMD; i++) memcpy((char*)all + i * size, g.gifts + 16 * i, size);
  *self = int(lane->at.thread_index_in_simdgroup);
  return g.present;
}

void* machine_threadgroup(int id, const char* name, size_t size, size_t item) {
  for (Shared& s : m.shared)
    if (s.id == id) return s.data;
  m.shared_size += size;
  if (m.shared_size > MAX_SHARED)
    fault("threadgroup memory over %u bytes: %zu with %s", MAX_SHARED, m.shared_size, name);
  m.shared.push_back({id, name, item, size, (unsigned char*)malloc(size)});
  memset(m.shared.back().data, POISON, size);
  if (trace) trace->threadgroup_memory(m.shared.back());
  return m.shared.back().data;
}

// ---- the scheduler
static std::vector<unsigned> turns(unsigned n) {
  std::vector<unsigned> v(n);
  std::iota(v.begin(), v.end(), 0u);
  if (order == DESCENDING) std::reverse(v.begin(), v.end());
  for (unsigned i = n; order == RANDOM && i > 1; i--) {
    randomness ^= randomness << 13, randomness ^= randomness >> 7, randomness ^= randomness << 17;
    std::swap(v[i - 1], v[(randomness >> 32) % i]);
  }
  return v;
}

// All `count` threads from `first` on must have come to one and the same call.
static void check_together(const Lane* first, unsigned count, State state) {
  const Lane* w = first;
  while (w->state != state) w++;
  for (const Lane* l = first; l < first + count; l++) {
    if (l->state == state && l->line == w->line && l->op == w->op && l->orders == w->orders) continue;
    if (l->state == DONE)
      fault("%s:%d: %s waits for thread %u of the threadgroup, which has returned", w->file, w->line,
            w->op, l->at.thread_index_in_threadgroup);
    fault("%s:%d: %s waits for thread %u of the threadgroup, which is at %s in line %d", w->file,
          w->line, w->op, l->at.thread_index_in_threadgroup, l->op, l->line);
  }
}

static void order_memory(unsigned* epoch, unsigned orders) {
  for (unsigned kind : {ORDERS_THREADGROUP, ORDERS_DEVICE}) epoch[kind] += (orders & kind) != 0;
}

// Let a simdgroup go on after an exchange or a barrier of its own; false if it waits for others.
static bool advance(unsigned index) {
  Lane* lanes = &m.lanes[index * SIMD];
  unsigned width = std::min(SIMD, m.threads - index * SIMD);
  Simdgroup& g = m.simdgroups[index];
  for (State state : {AT_EXCHANGE, AT_SIMD_BARRIER}) {
    bool any = false;
    for (unsigned i = 0; i < width; i++) any |= lanes[i].state == state;
    if (!any) continue;
    check_together(lanes, width, state);
    g.present = 0;
    for (unsigned i = 0; i < width; i++) {
      g.present |= 1u << i;
      memcpy(g.gifts + 16 * i, lanes[i].gift, 16);
      lanes[i].state = READY;
    }
    if (state == AT_SIMD_BARRIER) order_memory(g.epoch, lanes[0].orders);
    return true;
  }
  return false;
}

static void run_threadgroup() {
  for (;;) {
    for (unsigned g : turns(unsigned(m.simdgroups.size()))) {
      unsigned width = std::min(SIMD, m.threads - g * SIMD);
      do
        for (unsigned i : turns(width))
          if (m.lanes[g * SIMD + i].state == READY) to_lane(&m.lanes[g * SIMD + i]);
      while (advance(g));
    }
    bool any = false;
    for (unsigned i = 0; i < m.threads; i++) any |= m.lanes[i].state == AT_BARRIER;
    if (!any) return;
    check_together(&m.lanes[0], m.threads, AT_BARRIER);
    order_memory(m.epoch, m.lanes[0].orders);
    for (unsigned i = 0; i < m.threads; i++) m.lanes[i].state = READY;
  }
}

static void dispatch(const unsigned* grid, const unsigned* asked) {
  unsigned full[3], groups[3];
  for (int i = 0; i < 3; i++) {
    full[i] = std::min(asked[i], grid[i]);
    if (!full[i]) return;
    groups[i] = (grid[i] + full[i] - 1) / full[i];
  }
  unsigned most = full[0] * full[1] * full[2];
  if (most > MAX_THREADS) fault("a threadgroup of %u threads; %u is the most", most, MAX_THREADS);
  m.lanes.resize(most);
  m.stack_size = 256 << 10;
  char* stacks = (char*)mmap(nullptr, m.stack_size * most, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) fault("no memory for %u stacks", most);
  for (unsigned q : turns(groups[0] * groups[1] * groups[2])) {
    unsigned at[3] = {q % groups[0], q / groups[0] % groups[1], q / groups[0] / groups[1]}, size[3];
    for (int i = 0; i < 3; i++) size[i] = std::min(full[i], grid[i] - at[i] * full[i]);  // ragged
    m.group = q, m.threads = size[0] * size[1] * size[2];
    m.simdgroups.assign((m.threads + SIMD - 1) / SIMD, Simdgroup{});
    for (unsigned i = 0; i < m.threads; i++) {
      Lane& l = m.lanes[i];
      l = Lane{};
      unsigned p[3] = {i % size[0], i / size[0] % size[1], i / (size[0] * size[1])};
      for (int k = 0; k < 3; k++) {
        l.at.thread_position_in_grid[k] = at[k] * full[k] + p[k];
        l.at.thread_position_in_threadgroup[k] = p[k];
        l.at.threadgroup_position_in_grid[k] = at[k];
        l.at.threadgroups_per_grid[k] = groups[k];
        l.at.threads_per_threadgroup[k] = size[k];
        l.at.dispatch_threads_per_threadgroup[k] = full[k];
        l.at.threads_per_grid[k] = grid[k];
      }
      l.at.thread_index_in_threadgroup = i;
      l.at.thread_index_in_simdgroup = i % SIMD;
      l.at.simdgroup_index_in_threadgroup = i / SIMD;
      l.at.simdgroups_per_threadgroup = unsigned(m.simdgroups.size());
      l.stack = stacks + i * m.stack_size;
      l.stack_pointer = fiber_prepare(l.stack, m.stack_size, (void (*)(void*))live, &l);
    }
    run_threadgroup();
    if (trace) trace->threadgroup_ends();
    for (Shared& s : m.shared) free(s.data);
    m.shared.clear(), m.shared_size = 0;
  }
}

// ---- buffers
static void read(void* to, size_t size) {
  if (fread(to, 1, size, stdin) != size) fault("the dispatch is cut short");
}
static uint64_t number() {
  uint64_t v;
  read(&v, 8);
  return v;
}

static void make_buffer() {
  Buffer b;
  b.name.resize(number()), read(&b.name[0], b.name.size());
  b.kind = Kind(number()), b.item = number(), b.size = number();
  size_t start = number();
  b.view.resize(number()), read(b.view.data(), b.view.size());
#ifdef SANITIZED
  b.block = b.data = (unsigned char*)malloc(b.size);  // its own block: the sanitizer guards it
#else
  size_t whole = (b.size + 3 * GUARD - 1) / GUARD * GUARD;
  b.block = (unsigned char*)aligned_alloc(GUARD, whole);  // Metal's buffers begin on pages
  b.data = b.block + GUARD;
  memset(b.block, POISON, whole);
#endif
  if (b.kind == POISONED_OUTPUT) memset(b.data, POISON, b.size);
  else read(b.data, b.size);
  if (b.kind == INPUT) b.before.assign(b.data, b.data + b.size);
  m.data.push_back(b.data + start);
  m.buffers.push_back(b);
}

static void check_buffer(const Buffer& b) {
#ifndef SANITIZED
  for (size_t i = 0; i < GUARD; i++)
    if (b.block[i] != POISON || b.data[b.size + i] != POISON)
      fault("writes outside the %zu items of %s", b.size / b.item, b.name.c_str());
#endif
  if (b.kind == INPUT && memcmp(b.data, b.before.data(), b.size))
    fault("writes to the input %s", b.name.c_str());
}

int main() {
  unsigned grid[3], threads[3];
  for (unsigned& v : grid) v = unsigned(number());
  for (unsigned& v : threads) v = unsigned(number());
  order = unsigned(number());
  randomness = 0x9E3779B97F4A7C15ull * (number() + 1) + 1;
  for (uint64_t n = number(); n; n--) make_buffer();
  if (trace) trace->start();
  dispatch(grid, threads);
  for (const Buffer& b : m.buffers) check_buffer(b);
  if (trace) trace->report(stdout);
  for (const Buffer& b : m.buffers)
    if (b.kind != INPUT) fwrite(b.data, 1, b.size, stdout);
  fflush(stdout);
  _Exit(0);
}
