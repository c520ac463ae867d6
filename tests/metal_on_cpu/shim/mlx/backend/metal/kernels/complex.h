// In place of MLX's: its constructors differ only in address space, which C++ cannot tell apart.
#pragma once
template <typename T>
struct complex_t {
  T real, imag;
  constexpr complex_t(T r = T(0), T i = T(0)) : real(r), imag(i) {}
};
typedef complex_t<float> complex64_t;
