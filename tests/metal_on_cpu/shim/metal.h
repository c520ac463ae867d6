// The part of the Metal language that kernels use, as C++17.
//
// Address spaces vanish here (rules.py checks them); `threadgroup` declarations are rewritten before
// (source.py). What Metal has not (double math, log1p, ...) is left out, so that it does not compile.
#pragma once
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#include "machine.h"

#define __METAL__ 1
#define __METAL_VERSION__ 320
#define METAL_FUNC inline
#define METAL_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using ulong = unsigned long;
using half = _Float16;

// bfloat16: a float's upper half, rounded to nearest even; narrowing is explicit, as in Metal.
struct bfloat {
  uint16_t bits;
  bfloat() = default;
  template <class U, class = std::enable_if_t<std::is_arithmetic<U>::value || std::is_same<U, half>::value>>
  constexpr explicit bfloat(U v) : bits(rounded(float(v))) {}
  constexpr operator float() const { return __builtin_bit_cast(float, uint32_t(bits) << 16); }
  static constexpr uint16_t rounded(float f) {
    uint32_t u = __builtin_bit_cast(uint32_t, f);
    if ((u & 0x7FFFFFFF) > 0x7F800000) return uint16_t(u >> 16 | 0x40);  // NaN stays NaN
    return uint16_t((u + 0x7FFF + (u >> 16 & 1)) >> 16);
  }
#define METAL_OP(op)                                                                       \
  friend constexpr bfloat operator op(bfloat a, bfloat b) { return bfloat(float(a) op float(b)); } \
  bfloat& operator op##=(float b) { return *this = bfloat(float(*this) op b); }
  METAL_OP(+) METAL_OP(-) METAL_OP(*) METAL_OP(/)
#undef METAL_OP
  constexpr bfloat operator-() const { return bfloat(-float(*this)); }
};

template <class To, class From>
inline To as_type(From f) {
  static_assert(sizeof(To) == sizeof(From), "as_type: sizes differ");
  return __builtin_bit_cast(To, f);
}

namespace metal {
using std::conditional_t, std::enable_if_t, std::integral_constant, std::is_same_v, std::is_integral_v;
using std::enable_if, std::is_same, std::true_type, std::false_type, std::is_integral;
using std::is_signed_v, std::is_unsigned_v, std::is_convertible_v;

template <class T>
constexpr bool is_floating_point_v =
    std::is_same_v<T, float> || std::is_same_v<T, half> || std::is_same_v<T, bfloat>;

// ---- limits
template <class T>
struct numeric_limits : std::numeric_limits<T> {};
#define METAL_LIMITS(T, MAX, MIN, EPSILON)                                    \
  template <>                                                                 \
  struct numeric_limits<T> {                                                  \
    static constexpr T max() { return T(MAX); }                               \
    static constexpr T lowest() { return T(-MAX); }                           \
    static constexpr T min() { return T(MIN); }                               \
    static constexpr T epsilon() { return T(EPSILON); }                       \
    static constexpr T infinity() { return T(__builtin_inff()); }             \
    static constexpr T quiet_NaN() { return T(__builtin_nanf("")); }          \
  };
METAL_LIMITS(half, 65504.f, 0x1p-14f, 0x1p-10f)
METAL_LIMITS(bfloat, 0x1.fep127f, 0x1p-126f, 0x1p-7f)

// ---- vectors: no swizzles
template <class T, int N>
struct vec;
#define METAL_VECTOR(N, ALIGN, ...)                                                             \
  template <class T>                                                                            \
  struct alignas(sizeof(T) * ALIGN) vec<T, N> {                                                 \
    T __VA_ARGS__;                                                                              \
    vec() = default;                                                                            \
    constexpr vec(T s) { for (int i = 0; i < N; i++) (*this)[i] = s; }                          \
    template <class... A, class = std::enable_if_t<sizeof...(A) == N>>                          \
    constexpr vec(A... a) : vec(T(0)) { T t[] = {T(a)...}; for (int i = 0; i < N; i++) (*this)[i] = t[i]; } \
    template <class S> explicit vec(vec<S, N> o) { for (int i = 0; i < N; i++) (*this)[i] = T(o[i]); } \
    T& operator[](int i) { return (&x)[i]; }                                                    \
    const T& operator[](int i) const { return (&x)[i]; }                                        \
  };
METAL_VECTOR(2, 2, x, y)
METAL_VECTOR(3, 4, x, y, z)
METAL_VECTOR(4, 4, x, y, z, w)
#define METAL_OP(op)                                                                            \
  template <class T, int N> vec<T, N> operator op(vec<T, N> a, vec<T, N> b) {                   \
    for (int i = 0; i < N; i++) a[i] = a[i] op b[i];                                            \
    return a;                                                                                   \
  }                                                                                             \
  template <class T, int N> vec<T, N> operator op(vec<T, N> a, T b) { return a op vec<T, N>(b); } \
  template <class T, int N> vec<T, N> operator op(T a, vec<T, N> b) { return vec<T, N>(a) op b; } \
  template <class T, int N, class B> vec<T, N>& operator op##=(vec<T, N>& a, B b) { return a = a op b; }
METAL_OP(+) METAL_OP(-) METAL_OP(*) METAL_OP(/)
#undef METAL_OP
#define METAL_VECTORS(T) using T##2 = vec<T, 2>; using T##3 = vec<T, 3>; using T##4 = vec<T, 4>;
METAL_VECTORS(float) METAL_VECTORS(half) METAL_VECTORS(bfloat) METAL_VECTORS(int) METAL_VECTORS(uint)
METAL_VECTORS(short) METAL_VECTORS(ushort) METAL_VECTORS(uchar)

// ---- math: computed in float, returned in the argument's type
template <class T>
using floating = std::enable_if_t<is_floating_point_v<T>, T>;
template <class T>
using number = std::enable_if_t<is_floating_point_v<T> || std::is_integral_v<T>, T>;
#define METAL_UNARY(name, f) \
  template <class T> floating<T> name(T v) { float x = float(v); return T(METAL_ROUND(f)); }
#define METAL_BINARY(name, f) \
  template <class T> floating<T> name(T v, T w) { float x = float(v), y = float(w); return T(METAL_ROUND(f)); }
#define METAL_ROUND(f) f
#define METAL_MATH                                                                              \
  METAL_UNARY(exp, __builtin_expf(x)) METAL_UNARY(exp2, __builtin_exp2f(x))                     \
  METAL_UNARY(exp10, __builtin_powf(10.f, x)) METAL_UNARY(log, __builtin_logf(x))               \
  METAL_UNARY(log2, __builtin_log2f(x)) METAL_UNARY(log10, __builtin_log10f(x))                 \
  METAL_UNARY(sqrt, __builtin_sqrtf(x)) METAL_UNARY(rsqrt, 1.f / __builtin_sqrtf(x))            \
  METAL_UNARY(sin, __builtin_sinf(x)) METAL_UNARY(cos, __builtin_cosf(x))                       \
  METAL_UNARY(tan, __builtin_tanf(x)) METAL_UNARY(tanh, __builtin_tanhf(x))                     \
  METAL_UNARY(floor, __builtin_floorf(x)) METAL_UNARY(ceil, __builtin_ceilf(x))                 \
  METAL_UNARY(trunc, __builtin_truncf(x)) METAL_UNARY(rint, __builtin_rintf(x))                 \
  METAL_UNARY(round, __builtin_roundf(x)) METAL_UNARY(fabs, __builtin_fabsf(x))                 \
  METAL_BINARY(pow, __builtin_powf(x, y)) METAL_BINARY(powr, __builtin_powf(x, y))              \
  METAL_BINARY(fmod, __builtin_fmodf(x, y)) METAL_BINARY(divide, x / y)                         \
  METAL_BINARY(fmin, __builtin_fminf(x, y)) METAL_BINARY(fmax, __builtin_fmaxf(x, y))           \
  METAL_BINARY(atan2, __builtin_atan2f(x, y)) METAL_BINARY(copysign, __builtin_copysignf(x, y)) \
  template <class T> floating<T> fma(T a, T b, T c) {                                           \
    return T(__builtin_fmaf(float(a), float(b), float(c)));                                     \
  }                                                                                             \
  template <class T> number<T> min(T a, T b) {                                                  \
    if constexpr (std::is_integral_v<T>) return b < a ? b : a; else return fmin(a, b);          \
  }                                                                                             \
  template <class T> number<T> max(T a, T b) {                                                  \
    if constexpr (std::is_integral_v<T>) return a < b ? b : a; else return fmax(a, b);          \
  }                                                                                             \
  template <class T> number<T> clamp(T x, T low, T high) { return min(max(x, low), high); }     \
  template <class T> number<T> abs(T x) { return x < T(0) ? T(-x) : x; }
METAL_MATH
namespace precise { METAL_MATH }
// Metal's fast functions lose digits, some of them most for large arguments: here always 8 bits.
#undef METAL_ROUND
#define METAL_ROUND(f) metal::as_fast(f)
inline float as_fast(float x) { return as_type<float>(as_type<uint32_t>(x) & ~0xFFu); }
namespace fast { METAL_MATH }
template <class T> T select(T a, T b, bool c) { return c ? b : a; }
template <class T> floating<T> mix(T a, T b, T t) { return T(float(a) + (float(b) - float(a)) * float(t)); }
template <class T> floating<T> sign(T x) { return T(float(x) > 0 ? 1.f : float(x) < 0 ? -1.f : 0.f); }
template <class T, class = floating<T>> bool isnan(T x) { return __builtin_isnan(float(x)); }
template <class T, class = floating<T>> bool isinf(T x) { return __builtin_isinf(float(x)); }
template <class T, class = floating<T>> bool isfinite(T x) { return __builtin_isfinite(float(x)); }
inline uint popcount(uint x) { return uint(__builtin_popcount(x)); }
inline uint clz(uint x) { return x ? uint(__builtin_clz(x)) : 32u; }
inline uint ctz(uint x) { return x ? uint(__builtin_ctz(x)) : 32u; }

// ---- barriers
enum class mem_flags : unsigned { mem_none = 0, mem_threadgroup = ORDERS_THREADGROUP, mem_device = ORDERS_DEVICE };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(unsigned(a) | unsigned(b)); }
inline void threadgroup_barrier(mem_flags f, METAL_HERE) { machine_barrier(false, unsigned(f), file, line); }
inline void simdgroup_barrier(mem_flags f, METAL_HERE) { machine_barrier(true, unsigned(f), file, line); }

// ---- simdgroup functions: a lane sees what every lane brought and takes its answer from that
template <class T>
struct Lanes {
  T of[32];
  int self;
  uint present;
  const char* file;
  int line;
  Lanes(const char* name, T mine, const char* file, int line) : file(file), line(line) {
    static_assert(sizeof(T) <= 16, "a simdgroup function takes at most 16 bytes");
    present = machine_exchange(name, &mine, of, sizeof(T), &self, file, line);
  }
  T at(int lane) const {
    if (lane < 0 || lane > 31 || !(present >> lane & 1))
      machine_fault("a simdgroup function reads a lane that does not take part", file, line);
    return of[lane];
  }
  template <class F> T reduce(F f) const {  // pairwise, as hardware does
    T v[32];
    bool is[32];
    for (int i = 0; i < 32; i++) { v[i] = of[i]; is[i] = present >> i & 1; }
    for (int d = 1; d < 32; d *= 2)
      for (int i = 0; i + d < 32; i += 2 * d)
        if (is[i + d]) { v[i] = is[i] ? T(f(v[i], v[i + d])) : v[i + d]; is[i] = true; }
    return v[0];
  }
  template <class F> T prefix(T start, int end, F f) const {
    for (int i = 0; i < end; i++) start = T(f(start, at(i)));
    return start;
  }
};

#define METAL_SHUFFLE(name, LANE)                                                     \
  template <class T> T name(T v, ushort by, METAL_HERE) {                             \
    Lanes<T> lanes(#name, v, file, line);                                             \
    int self = lanes.self, n = int(by);                                               \
    (void)self, (void)n;                                                              \
    return lanes.at(LANE);                                                            \
  }
METAL_SHUFFLE(simd_shuffle, n)
METAL_SHUFFLE(simd_broadcast, n)
METAL_SHUFFLE(simd_shuffle_up, self < n ? self : self - n)
METAL_SHUFFLE(simd_shuffle_down, self + n > 31 ? self : self + n)
METAL_SHUFFLE(simd_shuffle_xor, self ^ n)
METAL_SHUFFLE(simd_shuffle_rotate_up, (self - n) & 31)
METAL_SHUFFLE(simd_shuffle_rotate_down, (self + n) & 31)
template <class T> T simd_broadcast_first(T v, METAL_HERE) {
  Lanes<T> lanes("simd_broadcast_first", v, file, line);
  return lanes.at(__builtin_ctz(lanes.present));
}
template <class T> T simd_shuffle_and_fill_up(T v, T fill, ushort n, METAL_HERE) {
  Lanes<T> lanes("simd_shuffle_and_fill_up", v, file, line), fills("simd_shuffle_and_fill_up", fill, file, line);
  return lanes.self < n ? fills.at(32 - n + lanes.self) : lanes.at(lanes.self - n);
}
template <class T> T simd_shuffle_and_fill_down(T v, T fill, ushort n, METAL_HERE) {
  Lanes<T> lanes("simd_shuffle_and_fill_down", v, file, line), fills("simd_shuffle_and_fill_down", fill, file, line);
  return lanes.self + n > 31 ? fills.at(lanes.self + n - 32) : lanes.at(lanes.self + n);
}
#define METAL_REDUCE(name, f) \
  template <class T> T name(T v, METAL_HERE) { return Lanes<T>(#name, v, file, line).reduce([](T a, T b) { return f; }); }
METAL_REDUCE(simd_sum, a + b) METAL_REDUCE(simd_product, a * b)
METAL_REDUCE(simd_min, b < a ? b : a) METAL_REDUCE(simd_max, a < b ? b : a)
METAL_REDUCE(simd_and, a & b) METAL_REDUCE(simd_or, a | b) METAL_REDUCE(simd_xor, a ^ b)
#define METAL_PREFIX(name, start, inclusive, f)                                       \
  template <class T> T name(T v, METAL_HERE) {                                        \
    Lanes<T> lanes(#name, v, file, line);                                             \
    return lanes.prefix(T(start), lanes.self + inclusive, [](T a, T b) { return f; }); \
  }
METAL_PREFIX(simd_prefix_inclusive_sum, 0, 1, a + b) METAL_PREFIX(simd_prefix_exclusive_sum, 0, 0, a + b)
METAL_PREFIX(simd_prefix_inclusive_product, 1, 1, a * b) METAL_PREFIX(simd_prefix_exclusive_product, 1, 0, a * b)
inline bool simd_any(bool v, METAL_HERE) { return Lanes<int>("simd_any", v, file, line).reduce([](int a, int b) { return a | b; }); }
inline bool simd_all(bool v, METAL_HERE) { return Lanes<int>("simd_all", v, file, line).reduce([](int a, int b) { return a & b; }); }
struct os_log {  // named by MLX's headers
  constexpr os_log(const char*, const char*) {}
  template <class... A> void log_debug(const char*, A...) const {}
};
}  // namespace metal

// Last, so that no system header sees these names.
#define device
#define constant
#define threadgroup
#define thread
