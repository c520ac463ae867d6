// mcsd_step: one token through the block of a slope and a decay section, projections to theta.
//
//   slope = U SiLU(V'),              V' = A (e^beta - 1) / (1 - e^(-n beta)), V if n = 0
//   decay = sigmoid(F) RMSNorm(E'),  E' = H, E if n = 0; the norm over Dc, times a gain
//   A <- e^-beta (A + V),  H <- alpha (H + E),  n <- n + 1
//
//   U, V, E, F    (B, 1, C, Dc)  float, float16_t or bfloat16_t
//   A, H          (B, C, Dc)     float
//   count         (B,)           int: n, the tokens read before
//   gain          (C Dc,)        any float type
//   rates         (C, 7)         float: e^-beta and what rounding it lost, alpha likewise, beta,
//                                e^beta - 1, the norm's eps
//   mask          (B, 1, 8)      bool: false where no token exists           read only if HAS_MASK
//   reset         (B, 1, 8)      bool: true where state and n restart at 0   read only if HAS_RESET
//   theta         (B, 1, C, Dc)  T: slope + decay; if CONCAT (B, 1, C, 2 Dc): [slope, decay]
//   A_next, H_next, count_next   as A, H, count
//
// Inputs are read in the strides they have.
// Template: T; int W, simdgroups per channel, PER_LANE = Dc / (32 W) rounded up; bool CONCAT,
// HAS_MASK, HAS_RESET. Grid (32 W, C, B), threadgroup (32 W, 1, 1): one per channel, for the norm.
//
// Bytes per feature, U to F being w wide, theta v: 4 w + v (2 v if CONCAT) + 16 for the two states,
// read once and written once, and the gain: the least.

threadgroup float squares[W];

const int lane = thread_position_in_threadgroup.x;
const int c = thread_position_in_grid.y;
const int b = thread_position_in_grid.z;
const int C = U_shape[2];
const int Dc = U_shape[3];

const bool exists = !HAS_MASK || mask[b * mask_strides[0]];
const bool restart = HAS_RESET && exists && reset[b * reset_strides[0]];
const int n = restart ? 0 : count[b * count_strides[0]];
const int64_t row = int64_t(b) * C + c;

// One load brings a channel's constants to a simdgroup: loaded one by one they would touch as many
// lines of memory as the features do.
const float constant_of_lane = lane % 32 < 7 ? rates[c * 7 + lane % 32] : 0.0f;
const float slope_rate = metal::simd_broadcast(constant_of_lane, 0);
const float slope_rest = metal::simd_broadcast(constant_of_lane, 1);
const float decay_rate = metal::simd_broadcast(constant_of_lane, 2);
const float decay_rest = metal::simd_broadcast(constant_of_lane, 3);
const float beta = metal::simd_broadcast(constant_of_lane, 4);
const float expm1_beta = metal::simd_broadcast(constant_of_lane, 5);
const float eps = metal::simd_broadcast(constant_of_lane, 6);

// E' stays in registers between the norm's sum and its use.
float E_past[PER_LANE];
float sum = 0.0f;
#pragma clang loop unroll(full)
for (int k = 0; k < PER_LANE; ++k) {
  const int j = lane + k * 32 * W;
  if (j < Dc) {
    const float e = static_cast<float>(E[b * E_strides[0] + c * E_strides[2] + j * E_strides[3]]);
    const float held = restart ? 0.0f : H[b * H_strides[0] + c * H_strides[1] + j * H_strides[2]];
    const float read = held + e;
    H_next[row * Dc + j] = exists ? metal::fma(decay_rate, read, decay_rest * read) : held;
    E_past[k] = n == 0 ? e : held;
    sum += E_past[k] * E_past[k];
  }
}
sum = metal::simd_sum(sum);
if (W > 1) {
  if (lane % 32 == 0) {
    squares[lane / 32] = sum;
  }
  threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  sum = 0.0f;
  for (int w = 0; w < W; ++w) {
    sum += squares[w];
  }
}
const float norm = metal::precise::rsqrt(sum / Dc + eps);

// 1 - e^-t loses its digits for a small t; 2 u / (1 + u) with u = tanh(t / 2) does not.
const float u = metal::precise::tanh(0.5f * n * beta);
const float per_weight = n == 0 ? 0.0f : expm1_beta * (1.0f + u) / (2.0f * u);

#pragma clang loop unroll(full)
for (int k = 0; k < PER_LANE; ++k) {
  const int j = lane + k * 32 * W;
  if (j < Dc) {
    const float v = static_cast<float>(V[b * V_strides[0] + c * V_strides[2] + j * V_strides[3]]);
    const float held = restart ? 0.0f : A[b * A_strides[0] + c * A_strides[1] + j * A_strides[2]];
    const float read = held + v;
    A_next[row * Dc + j] = exists ? metal::fma(slope_rate, read, slope_rest * read) : held;

    const float V_past = n == 0 ? v : held * per_weight;
    const float current =
        static_cast<float>(U[b * U_strides[0] + c * U_strides[2] + j * U_strides[3]]);
    const float slope = current * (V_past / (1.0f + metal::precise::exp(-V_past)));
    const float f = static_cast<float>(F[b * F_strides[0] + c * F_strides[2] + j * F_strides[3]]);
    const float weight = static_cast<float>(gain[(c * Dc + j) * gain_strides[0]]);
    const float normed = E_past[k] * norm * weight;
    const float decay = normed / (1.0f + metal::precise::exp(-f));
    if (CONCAT) {
      theta[row * 2 * Dc + j] = static_cast<T>(slope);
      theta[row * 2 * Dc + Dc + j] = static_cast<T>(decay);
    } else {
      theta[row * Dc + j] = static_cast<T>(slope + decay);
    }
  }
}
if (c == 0 && lane == 0) {
  count_next[b] = n + (exists ? 1 : 0);
}
