// The Metal language as declarations in C++ for OpenCL, whose address spaces, missing double and
// missing function pointers are Metal's. For rules.py: nothing here runs.
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#define device __global
#define constant __constant
#define threadgroup __local
#define thread __private
#define METAL_FUNC inline

typedef unsigned char uchar, uint8_t;
typedef unsigned short ushort, uint16_t;
typedef unsigned int uint, uint32_t;
typedef unsigned long ulong, uint64_t;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef ulong size_t;
typedef half float16_t;
// Half stands for bfloat: of a class, copies between address spaces would need constructors for each.
typedef half bfloat, bfloat16_t;
#define VECTORS(T)                                  \
  typedef T T##2 __attribute__((ext_vector_type(2))); \
  typedef T T##3 __attribute__((ext_vector_type(3))); \
  typedef T T##4 __attribute__((ext_vector_type(4)));
VECTORS(float) VECTORS(half) VECTORS(int) VECTORS(uint) VECTORS(short) VECTORS(ushort) VECTORS(uchar)

__local void* machine_threadgroup(int, __constant const char*, ulong, ulong);
template <class T> struct element { using type = T; };
template <class T, ulong n> struct element<T[n]> : element<T> {};
namespace std { template <class T> using remove_all_extents_t = typename element<T>::type; }
template <class To, class From> To as_type(From);

namespace metal {
enum class mem_flags { mem_none = 0, mem_threadgroup = 1, mem_device = 2 };
mem_flags operator|(mem_flags, mem_flags);
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);

#define ONE(f) template <class T> T f(T);
#define TWO(f) template <class T> T f(T, T);
#define MATH                                                                                  \
  ONE(exp) ONE(exp2) ONE(exp10) ONE(log) ONE(log2) ONE(log10) ONE(sqrt) ONE(rsqrt) ONE(sin)   \
  ONE(cos) ONE(tan) ONE(tanh) ONE(floor) ONE(ceil) ONE(trunc) ONE(rint) ONE(round) ONE(fabs)  \
  ONE(abs) TWO(pow) TWO(powr) TWO(fmod) TWO(divide) TWO(fmin) TWO(fmax) TWO(min) TWO(max)     \
  TWO(atan2) TWO(copysign) template <class T> T fma(T, T, T); template <class T> T clamp(T, T, T);
MATH
namespace fast { MATH }
namespace precise { MATH }
ONE(sign) ONE(popcount) ONE(clz) ONE(ctz)
template <class T> T mix(T, T, T);
template <class T> T select(T, T, bool);
template <class T> bool isnan(T);
template <class T> bool isinf(T);
template <class T> bool isfinite(T);
template <class T> struct numeric_limits {
  static constexpr T max(), min(), lowest(), infinity(), quiet_NaN(), epsilon();
};

#define SHUFFLE(f) template <class T> T f(T, ushort);
SHUFFLE(simd_shuffle) SHUFFLE(simd_broadcast) SHUFFLE(simd_shuffle_up) SHUFFLE(simd_shuffle_down)
SHUFFLE(simd_shuffle_xor) SHUFFLE(simd_shuffle_rotate_up) SHUFFLE(simd_shuffle_rotate_down)
template <class T> T simd_shuffle_and_fill_up(T, T, ushort);
template <class T> T simd_shuffle_and_fill_down(T, T, ushort);
ONE(simd_broadcast_first) ONE(simd_sum) ONE(simd_product) ONE(simd_min) ONE(simd_max) ONE(simd_and)
ONE(simd_or) ONE(simd_xor) ONE(simd_prefix_inclusive_sum) ONE(simd_prefix_exclusive_sum)
ONE(simd_prefix_inclusive_product) ONE(simd_prefix_exclusive_product)
bool simd_any(bool);
bool simd_all(bool);
}  // namespace metal
using namespace metal;
