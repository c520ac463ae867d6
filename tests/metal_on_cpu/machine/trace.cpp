// Sees every memory access of the kernel: counts the traffic, and checks bounds, races and use before
// initialisation.
//
// The compiler's -fsanitize=thread turns each load and store into a call, __tsan_read4(address) and
// the like. The sanitizer's library is not linked: the calls end here. (Its own race check is made for
// threads of the operating system; ours knows simdgroups, threadgroups and what a barrier orders.)
#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <unordered_map>

#include "engine.h"

static Machine& m = machine;

// ---- who touched an item, and what has been ordered since
struct Access {
  unsigned thread = ~0u, group = 0, epoch = 0, simdgroup = 0, simd_epoch = 0;
};
struct Item {
  Access write, reads[2];  // two readers: a writer differs from one of them
  bool written = false;
};
struct Traffic {
  uint64_t bytes = 0, lines = 0, least_lines = 0;
};
struct Region {
  std::string name;
  const unsigned char *data, *low, *high;  // low..high: data and the guard zones round it
  size_t item, size;
  bool input;
  unsigned kind;  // of memory, as barriers order it
  const std::vector<unsigned char>* view;
  std::vector<Item> items;
  Traffic traffic[2];
};
static std::vector<Region> regions;
static size_t buffers;

// A fault names the program counter; execute.py turns it into a line of the kernel.
#define FAULT(pc, format, ...) \
  fault("pc %zx: " format, size_t(offset((void*)(pc))), __VA_ARGS__)
static size_t offset(void* pc) {
  Dl_info info;
  return dladdr(pc, &info) ? size_t((char*)pc - (char*)info.dli_fbase) - 1 : 0;
}

static bool unordered(const Access& a, const Access& now) {
  if (a.thread == ~0u) return false;
  if (a.group != now.group) return true;  // nothing orders threadgroups
  if (a.thread == now.thread || a.epoch != now.epoch) return false;
  return a.simdgroup != now.simdgroup || a.simd_epoch == now.simd_epoch;
}

static void check_item(Region& r, size_t i, bool write, void* pc) {
  const Place& at = m.current->at;
  unsigned self = at.thread_index_in_threadgroup, simdgroup = at.simdgroup_index_in_threadgroup;
  if (r.view && !r.view->empty() && !(*r.view)[i])
    FAULT(pc, "reads item %zu of %s, between the elements of its strides", i, r.name.c_str());
  if (r.input) return;
  Item& item = r.items[i];
  Access now{self, m.group, m.epoch[r.kind], simdgroup, m.simdgroups[simdgroup].epoch[r.kind]};
  const Access* other = unordered(item.write, now) ? &item.write : nullptr;
  for (const Access& a : item.reads)
    if (write && unordered(a, now)) other = &a;
  if (other)
    FAULT(pc, "race on %s[%zu]: thread %u of threadgroup %u %s, and thread %u of threadgroup %u %s with no barrier between",
          r.name.c_str(), i, self, m.group, write ? "writes" : "reads", other->thread, other->group,
          other == &item.write ? "wrote" : "read");
  if (write) {
    item.write = now;
    item.written = true;
    return;
  }
  if (!item.written)
    FAULT(pc, "thread %u of threadgroup %u reads %s[%zu], which nothing has written", self, m.group,
          r.name.c_str(), i);
  Access &a = item.reads[0], &b = item.reads[1];
  if (!unordered(a, now)) a = now;
  else if (!unordered(b, now) || b.simdgroup == a.simdgroup) b = now;
}

// ---- traffic: the k-th run of one instruction by the lanes of a simdgroup is one access of the GPU
struct Wide {
  uint64_t address[SIMD];
  unsigned count = 0, size = 0;
  Region* region = nullptr;
  bool write = false;
};
struct Hash {
  size_t operator()(const std::pair<uint64_t, uint64_t>& k) const {
    return (k.first ^ k.second * 0x9E3779B97F4A7C15ull) * 0xD6E8FEB86659FD93ull >> 16;
  }
};
template <class V>
using Table = std::unordered_map<std::pair<uint64_t, uint64_t>, V, Hash>;
static Table<uint64_t> runs;  // (instruction, lane) -> times run
static Table<Wide> wides;     // (instruction, run and simdgroup)

static void count(Region& r, uint64_t address, unsigned size, bool write, void* pc) {
  unsigned lane = m.current->at.thread_index_in_threadgroup;
  uint64_t k = runs[{uint64_t(pc), lane}]++;
  Wide& w = wides[{uint64_t(pc), k << 16 | lane / SIMD}];
  if (w.count == SIMD) return;
  w.address[w.count++] = address, w.size = size, w.region = &r, w.write = write;
}

static void threadgroup_ends() {
  constexpr uint64_t LINE = 128;
  for (auto& entry : wides) {
    Wide& w = entry.second;
    std::vector<uint64_t> lines;
    for (unsigned i = 0; i < w.count; i++)
      for (uint64_t l = w.address[i] / LINE; l <= (w.address[i] + w.size - 1) / LINE; l++) lines.push_back(l);
    std::sort(lines.begin(), lines.end());
    Traffic& t = w.region->traffic[w.write];
    t.lines += uint64_t(std::unique(lines.begin(), lines.end()) - lines.begin());
    std::sort(w.address, w.address + w.count);
    uint64_t distinct = uint64_t(std::unique(w.address, w.address + w.count) - w.address);
    t.bytes += distinct * w.size;  // lanes that read one address are served at once
    t.least_lines += (distinct * w.size + LINE - 1) / LINE;
  }
  wides.clear(), runs.clear();
  regions.resize(buffers);  // the threadgroup's own memory is gone
}

// ---- the start and the end
static void start() {
  regions.reserve(m.buffers.size() + 512);  // Wide keeps pointers
  for (const Buffer& b : m.buffers) {
    regions.push_back({b.name, b.data, b.block, b.data + b.size + GUARD, b.item, b.size,
                       b.kind == INPUT, ORDERS_DEVICE, b.kind == INPUT ? &b.view : nullptr, {}, {}});
    if (b.kind != INPUT) regions.back().items.resize(b.size / b.item);
    for (Item& i : regions.back().items) i.written = b.kind == FILLED_OUTPUT;
  }
  buffers = regions.size();
}

static void threadgroup_memory(const Shared& s) {
  if (regions.size() == regions.capacity()) fault("too many threadgroup declarations");
  regions.push_back({s.name, s.data, s.data, s.data + s.size, s.item, s.size, false,
                     ORDERS_THREADGROUP, nullptr, std::vector<Item>(s.size / s.item), {}});
}

static void report(FILE* out) {
  for (const Region& r : regions) {
    size_t missing = 0;
    for (const Item& i : r.items) missing += !i.written;
    if (missing) fault("%zu of the %zu items of %s were never written", missing, r.items.size(), r.name.c_str());
  }
  for (const Region& r : regions) fwrite(r.traffic, 1, sizeof r.traffic, out);
}

static const Trace hooks = {start, threadgroup_memory, threadgroup_ends, report};
static const bool hooked = (trace = &hooks, true);

// ---- the compiler's calls
static void access(void* address, size_t size, bool write, void* pc) {
  if (!m.current) return;
  const unsigned char* p = (unsigned char*)address;
  if ((char*)p >= m.current->stack && (char*)p < m.current->stack + m.stack_size) return;
  for (Region& r : regions) {
    if (p < r.low || p >= r.high) continue;
    long at = long(p - r.data), i = (p < r.data ? at + 1 - long(r.item) : at) / long(r.item);
    if (p < r.data || p + size > r.data + r.size)
      FAULT(pc, "%s %s[%ld], which has %zu items", write ? "writes" : "reads", r.name.c_str(), i, r.size / r.item);
    if (write && r.input) FAULT(pc, "writes to the input %s[%ld]", r.name.c_str(), i);
    if (&r < &regions[0] + buffers) count(r, uint64_t(p), unsigned(size), write, pc);
    for (size_t k = 0; k < size; k += r.item) check_item(r, size_t(i) + k / r.item, write, pc);
    return;
  }
  Dl_info info;  // constants of the program are fine
  if (write || !dladdr(address, &info))
    FAULT(pc, "%s memory outside every buffer", write ? "writes" : "reads");
}

#define PC __builtin_return_address(0)
extern "C" {
#define SIZE(n)                                                         \
  void __tsan_read##n(void* p) { access(p, n, false, PC); }             \
  void __tsan_write##n(void* p) { access(p, n, true, PC); }             \
  void __tsan_unaligned_read##n(void* p) { access(p, n, false, PC); }   \
  void __tsan_unaligned_write##n(void* p) { access(p, n, true, PC); }
SIZE(1) SIZE(2) SIZE(4) SIZE(8) SIZE(16)
void __tsan_read_range(void* p, size_t n) { access(p, n, false, PC); }
void __tsan_write_range(void* p, size_t n) { access(p, n, true, PC); }
void* __tsan_memmove(void* to, const void* from, size_t n) {  // the next three by clang
  access((void*)from, n, false, PC), access(to, n, true, PC);
  return memmove(to, from, n);
}
void* __tsan_memcpy(void* to, const void* from, size_t n) {
  access((void*)from, n, false, PC), access(to, n, true, PC);
  return memcpy(to, from, n);
}
void* __tsan_memset(void* to, int value, size_t n) {
  access(to, n, true, PC);
  return memset(to, value, n);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
