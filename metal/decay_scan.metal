// decay_scan: h_{n+1} = lambda (h_n + x_n); every h_n as it is before token n is read.
//
//   x      (B, N, C, Dc)  float, float16_t or bfloat16_t
//   decay  (3, C)         float: lambda, what rounding it to float lost, log2(lambda)
//   h0     (B, C, Dc)     float
//   mask   (B, N)         bool: false where no token exists           read only if HAS_MASK
//   reset  (B, N)         bool: true where the state restarts at 0    read only if HAS_RESET
//   h      (B, N, C, Dc)  float
//   last   (B, C, Dc)     float, the state after token N - 1
//
// Inputs are read in the strides they have.
// Template: int S, segments of time; bool HAS_MASK, HAS_RESET.
// Grid (C Dc rounded up to 32, S, B), threadgroup (32, S, 1): one lane per feature, neighbouring
// lanes on neighbouring features, one simdgroup per segment, time in registers.
//
// Bytes per element of x, x being w wide: w + 4 if S = 1, which is the least: x is read once and h
// written once. If S > 1 every segment but the last is read twice, first for what it leaves behind
// on its own: w (2 - 1/S) + 4. Masks add one byte per token, shared by the 32 lanes.
//
// Each number of the recurrence is a pair of floats, a value and the rest its roundings lost, or a
// window of 16,384 tokens would gather their errors. It leaves as the nearest float.

constexpr int AHEAD = 8;  // tokens a thread loads before it needs the first
threadgroup float left[S][32];  // what a segment leaves behind, begun at zero
threadgroup float kept[S][32];  // the part of its start that it keeps; negative if it was cut

const int lane = thread_position_in_threadgroup.x;
const int s = thread_position_in_threadgroup.y;
const int f = thread_position_in_grid.x;  // c Dc + j
const int b = thread_position_in_grid.z;
const int N = x_shape[1];
const int C = x_shape[2];
const int Dc = x_shape[3];
const int D = C * Dc;
const bool on = f < D;  // a lane past the last feature still meets the barrier
const int c = on ? f / Dc : 0;
const int j = on ? f % Dc : 0;

const int per_segment = (N + S - 1) / S;
const int begin = metal::min(s * per_segment, N);
const int end = on ? metal::min(begin + per_segment, N) : begin;

const int64_t x_at = b * x_strides[0] + c * x_strides[2] + j * x_strides[3];
const int64_t x_step = x_strides[1];
const int64_t h_at = int64_t(b) * N * D + f;
const int64_t mask_at = b * mask_strides[0];
const int64_t reset_at = b * reset_strides[0];
const float lambda = decay[c];
const float lambda_rest = decay[C + c];

// Pass 0 finds what each segment leaves behind; pass 1 starts from the true state and writes.
for (int pass = S > 1 ? 0 : 1; pass < 2; ++pass) {
  float state = 0.0f;
  float rest = 0.0f;
  if (pass == 1 && S > 1) {
    threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  }
  if (pass == 1 && on) {
    state = h0[b * h0_strides[0] + c * h0_strides[1] + j * h0_strides[2]];
    for (int k = 0; k < s; ++k) {
      // Selected, not scaled by zero: a state that was cut may be infinite.
      const float part = kept[k][lane];
      state = part < 0.0f ? left[k][lane] : metal::fma(part, state, left[k][lane]);
    }
  }

  const int stop = pass == 1 || s < S - 1 ? end : begin;  // nothing follows the last segment
  int count = 0;  // tokens that exist
  bool cut = false;
  for (int n = begin; n < stop; n += AHEAD) {
    float v[AHEAD];
#pragma clang loop unroll(full)
    for (int k = 0; k < AHEAD; ++k) {
      v[k] = n + k < stop ? static_cast<float>(x[x_at + (n + k) * x_step]) : 0.0f;
    }
#pragma clang loop unroll(full)
    for (int k = 0; k < AHEAD; ++k) {
      if (n + k < stop) {
        const bool exists = !HAS_MASK || mask[mask_at + (n + k) * mask_strides[1]];
        if (HAS_RESET && exists && reset[reset_at + (n + k) * reset_strides[1]]) {
          state = rest = 0.0f;
          cut = true;
        }
        if (pass == 1) {
          h[h_at + int64_t(n + k) * D] = state + rest;
        }
        if (exists) {
          const float sum = state + v[k];
          const float gained = sum - state;
          rest += (state - (sum - gained)) + (v[k] - gained);  // what the sum lost
          state = lambda * sum;
          rest = metal::fma(lambda, rest, metal::fma(lambda, sum, -state) + lambda_rest * sum);
          ++count;
        }
      }
    }
  }

  if (pass == 0) {
    left[s][lane] = state + rest;
    const float part = count == 0 ? 1.0f : metal::precise::exp2(count * decay[2 * C + c]);
    kept[s][lane] = cut ? -1.0f : part;
  } else if (on && s == S - 1) {
    last[b * D + f] = state + rest;
  }
}
