// mcsd_mix: what a slope and a decay section make of their states, over a whole sequence.
//
//   slope = U SiLU(V'),              V' = A (e^beta - 1) / (1 - e^(-n beta)), V if n = 0
//   decay = sigmoid(F) RMSNorm(E'),  E' = H, E if n = 0; the norm over Dc, times a gain
//
//   U, V, E, F    (B, N, C, Dc)  float, float16_t or bfloat16_t; V and E read only where n = 0
//   A, H          (B, N, C, Dc)  float, the states before each token
//   n             (B, N)         int, the tokens read before each
//   gain          (C Dc,)        any float type
//   rates         (C, 3)         float: beta, e^beta - 1, the norm's eps
//   theta         (B, N, C, Dc)  T: slope + decay; if CONCAT (B, N, C, 2 Dc): [slope, decay]
//
// Inputs are read in the strides they have.
// Template: T; int TOKENS of a simdgroup, PER_LANE = Dc / 32 rounded up; bool CONCAT.
// Grid (32, C, B ceil(N / TOKENS)), threadgroup (32, 1, 1): a simdgroup holds a channel, for the
// norm, and takes TOKENS tokens in turn.
//
// Bytes per feature and token, U and F being w wide, theta v: 2 w + 8 + v (2 v if CONCAT), the
// least, and 1 / TOKENS of the gain's.

const int lane = thread_position_in_threadgroup.x;
const int c = thread_position_in_grid.y;
const int N = U_shape[1];
const int C = U_shape[2];
const int Dc = U_shape[3];
const int blocks = (N + TOKENS - 1) / TOKENS;
const int b = thread_position_in_grid.z / blocks;
const int begin = thread_position_in_grid.z % blocks * TOKENS;
const int end = metal::min(begin + TOKENS, N);

// One load for all tokens, one for all constants: each touches a line of memory of its own.
const bool loads = lane < TOKENS && begin + lane < end;
const int n_of_lane = loads ? n[b * n_strides[0] + (begin + lane) * n_strides[1]] : 0;
const float rate_of_lane = lane < 3 ? rates[c * 3 + lane] : 0.0f;
const float beta = metal::simd_broadcast(rate_of_lane, 0);
const float expm1_beta = metal::simd_broadcast(rate_of_lane, 1);
const float eps = metal::simd_broadcast(rate_of_lane, 2);

float weight[PER_LANE];  // the gain
#pragma clang loop unroll(full)
for (int k = 0; k < PER_LANE; ++k) {
  const int j = lane + k * 32;
  weight[k] = j < Dc ? static_cast<float>(gain[(c * Dc + j) * gain_strides[0]]) : 0.0f;
}

for (int t = begin; t < end; ++t) {
  const int seen = metal::simd_shuffle(n_of_lane, t - begin);
  const int64_t row = (int64_t(b) * N + t) * C + c;

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
  const float norm = metal::precise::rsqrt(metal::simd_sum(sum) / Dc + eps);

  // 1 - e^-t loses its digits for a small t; 2 u / (1 + u) with u = tanh(t / 2) does not.
  const float u = metal::precise::tanh(0.5f * seen * beta);
  const float per_weight = seen == 0 ? 0.0f : expm1_beta * (1.0f + u) / (2.0f * u);

#pragma clang loop unroll(full)
  for (int k = 0; k < PER_LANE; ++k) {
    const int j = lane + k * 32;
    if (j < Dc) {
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
      const float f = static_cast<float>(
          F[b * F_strides[0] + t * F_strides[1] + c * F_strides[2] + j * F_strides[3]]);
      const float slope = current * (V_past / (1.0f + metal::precise::exp(-V_past)));
      const float decay = E_past[k] * norm * weight[k] / (1.0f + metal::precise::exp(-f));
      if (CONCAT) {
        theta[row * 2 * Dc + j] = static_cast<T>(slope);
        theta[row * 2 * Dc + Dc + j] = static_cast<T>(decay);
      } else {
        theta[row * Dc + j] = static_cast<T>(slope + decay);
      }
    }
  }
}
