// mcsd_mix_grad: the adjoint of mcsd_mix. With s = sigmoid(V'), f = sigmoid(F), q = E' / rms(E'),
// a and d the cotangents of slope and of decay,
//
//   dU = a V' s          dV' = a U s (1 + V' (1 - s))
//   dF = d q gain f (1 - f)
//   dE' = (p - q mean(p q)) / rms(E'),  p = d f gain       dgain = sum of d f q over tokens
//
// In p - q mean(p q) all of p may cancel but what eps keeps (Dc = 1). So p is parted, g being a
// number, into g E', of which eps / rms(E')^2 is kept, and a rest at right angles to E', of which
// all is. The rest is parted once more, since rounding left some of E' in it.
//
// dV' passes on to A, times its factor, or to V where n = 0; dE' to H, or to E where n = 0.
//
//   dtheta              (B, N, C Dc) or (B, N, 2 C Dc)  float, float16_t or bfloat16_t
//   U, V, E, F, A, H, n, gain, rates                    as mcsd_mix has them
//   dU, dV, dE, dF      (B, N, C, Dc)  T
//   dA, dH              (B, N, C, Dc)  float
//   dgain               (B ceil(N / TOKENS), C, Dc)  float, a part for each block of tokens
//
// Inputs are read in the strides they have.
// Template: T; int TOKENS of a simdgroup, PER_LANE = Dc / 32 rounded up; bool CONCAT.
// Grid (32, C, B ceil(N / TOKENS)), threadgroup (32, 1, 1), as mcsd_mix. No atomics: the parts of
// dgain are summed afterwards, in one order.
//
// Bytes per feature and token, U to F being w wide: 2 w for U and F, w (2 w if CONCAT) for dtheta,
// 8 for A and H; written 4 w + 8; and 5 / TOKENS or so for the gain.

const int lane = thread_position_in_threadgroup.x;
const int c = thread_position_in_grid.y;
const int N = U_shape[1];
const int C = U_shape[2];
const int Dc = U_shape[3];
const int blocks = (N + TOKENS - 1) / TOKENS;
const int block = thread_position_in_grid.z;
const int b = block / blocks;
const int begin = block % blocks * TOKENS;
const int end = metal::min(begin + TOKENS, N);

// One load for all tokens, one for all constants: each touches a line of memory of its own.
const bool loads = lane < TOKENS && begin + lane < end;
const int n_of_lane = loads ? n[b * n_strides[0] + (begin + lane) * n_strides[1]] : 0;
const float rate_of_lane = lane < 3 ? rates[c * 3 + lane] : 0.0f;
const float beta = metal::simd_broadcast(rate_of_lane, 0);
const float expm1_beta = metal::simd_broadcast(rate_of_lane, 1);
const float eps = metal::simd_broadcast(rate_of_lane, 2);

float weight[PER_LANE];  // the gain
float weight_grad[PER_LANE];
#pragma clang loop unroll(full)
for (int k = 0; k < PER_LANE; ++k) {
  const int j = lane + k * 32;
  weight[k] = j < Dc ? static_cast<float>(gain[(c * Dc + j) * gain_strides[0]]) : 0.0f;
  weight_grad[k] = 0.0f;
}

for (int t = begin; t < end; ++t) {
  const int seen = metal::simd_shuffle(n_of_lane, t - begin);
  const int64_t row = (int64_t(b) * N + t) * C + c;
  const int64_t theta_at = b * dtheta_strides[0] + t * dtheta_strides[1] +
      c * (CONCAT ? 2 : 1) * Dc * dtheta_strides[2];

  float E_past[PER_LANE];
  float sum = 0.0f;
#pragma clang loop unroll(full)
  for (int k = 0; k < PER_LANE; ++k) {
    const int j = lane + k * 32;
    E_past[k] = 0.0f;
    if (j < Dc) {
      if (seen == 0) {
        E_past[k] = static_cast<float>(
            E[b * E_strides[0] + t * E_strides[1] + c * E_strides[2] + j * E_strides[3]]);
      } else {
        E_past[k] = H[b * H_strides[0] + t * H_strides[1] + c * H_strides[2] + j * H_strides[3]];
      }
    }
    sum += E_past[k] * E_past[k];
  }
  sum = metal::simd_sum(sum);
  const float norm = metal::precise::rsqrt(sum / Dc + eps);

  // 1 - e^-t loses its digits for a small t; 2 u / (1 + u) with u = tanh(t / 2) does not.
  const float u = metal::precise::tanh(0.5f * seen * beta);
  const float per_weight = seen == 0 ? 0.0f : expm1_beta * (1.0f + u) / (2.0f * u);

  float p[PER_LANE];
  float along = 0.0f;  // sum of p E'
#pragma clang loop unroll(full)
  for (int k = 0; k < PER_LANE; ++k) {
    const int j = lane + k * 32;
    p[k] = 0.0f;
    if (j < Dc) {
      const float a = static_cast<float>(dtheta[theta_at + j * dtheta_strides[2]]);
      const float d =
          CONCAT ? static_cast<float>(dtheta[theta_at + (Dc + j) * dtheta_strides[2]]) : a;

      float V_past;
      if (seen == 0) {
        V_past = static_cast<float>(
            V[b * V_strides[0] + t * V_strides[1] + c * V_strides[2] + j * V_strides[3]]);
      } else {
        V_past = per_weight *
            A[b * A_strides[0] + t * A_strides[1] + c * A_strides[2] + j * A_strides[3]];
      }
      const float current = static_cast<float>(
          U[b * U_strides[0] + t * U_strides[1] + c * U_strides[2] + j * U_strides[3]]);
      const float s = 1.0f / (1.0f + metal::precise::exp(-V_past));
      const float V_grad = a * current * s * (1.0f + V_past * (1.0f - s));
      dU[row * Dc + j] = static_cast<T>(a * V_past * s);
      dV[row * Dc + j] = static_cast<T>(seen == 0 ? V_grad : 0.0f);
      dA[row * Dc + j] = V_grad * per_weight;

      const float gate = static_cast<float>(
          F[b * F_strides[0] + t * F_strides[1] + c * F_strides[2] + j * F_strides[3]]);
      const float f = 1.0f / (1.0f + metal::precise::exp(-gate));
      const float rest = 1.0f / (1.0f + metal::precise::exp(gate));  // 1 - f, all digits of it
      const float q = E_past[k] * norm;
      dF[row * Dc + j] = static_cast<T>(d * q * weight[k] * f * rest);
      weight_grad[k] += d * f * q;
      p[k] = d * f * weight[k];
      along += p[k] * E_past[k];
    }
  }
  along = metal::simd_sum(along);
  const float g = sum > 0.0f ? along / sum : 0.0f;
  float still = 0.0f;  // of E' in the rest, after rounding
#pragma clang loop unroll(full)
  for (int k = 0; k < PER_LANE; ++k) {
    p[k] = metal::fma(-g, E_past[k], p[k]);
    still += p[k] * E_past[k];
  }
  still = metal::simd_sum(still);
  const float more = sum > 0.0f ? still / sum : 0.0f;
  const float kept = (g + more) * eps * norm * norm;

#pragma clang loop unroll(full)
  for (int k = 0; k < PER_LANE; ++k) {
    const int j = lane + k * 32;
    if (j < Dc) {
      const float E_grad = (metal::fma(-more, E_past[k], p[k]) + kept * E_past[k]) * norm;
      dE[row * Dc + j] = static_cast<T>(seen == 0 ? E_grad : 0.0f);
      dH[row * Dc + j] = seen == 0 ? 0.0f : E_grad;
    }
  }
}

#pragma clang loop unroll(full)
for (int k = 0; k < PER_LANE; ++k) {
  const int j = lane + k * 32;
  if (j < Dc) {
    dgain[(int64_t(block) * C + c) * Dc + j] = weight_grad[k];
  }
}
