// decay_scan: h_{n+1} = lambda (h_n + x_n); every h_n as it is before token n is read.
//
//   x      (B, N, C, Dc)  float, float16_t or bfloat16_t
//   decay  (3, C)         float: lambda, what rounding it to float lost, log2(lambda)
//   h0     (B, C, Dc)     float
//   mask   (B, N, 8)      bool: false where no token exists           read only if HAS_MASK
//   reset  (B, N, 8)      bool: true where the state restarts at 0    read only if HAS_RESET
//   h      (B, N, C, Dc)  float
//   last   (B, C, Dc)     float, the state after token N - 1
//
// Inputs are read in the strides they have.
// Template: int S, segments of time; bool HAS_MASK, HAS_RESET.
// Grid (C Dc rounded up to 32, S, B), threadgroup (32, S, 1): one lane per feature, neighbouring
// lanes on neighbouring features, one simdgroup per segment, time in registers.
//
// Where S > 1, a segment is read for what it leaves behind on its own, then once more from its true
// start. But the first knows its start at once and the last leaves nothing behind: they are read
// once, and are twice as long as the others, to be ready when the others are.
//
// Bytes per element of x, x being w wide: w + 4 if S = 1, which is the least: x is read once and h
// written once; else 2 w S / (S + 2) + 4. Masks add one byte per token, shared by the 32 lanes.
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

const int unit = (N + S + 1) / (S + 2);  // of a segment; the first and the last have two
const int begin = metal::min((s > 0 ? s + 1 : 0) * unit, N);
const int end = on ? metal::min((s < S - 1 ? s + 2 : S + 2) * unit, N) : begin;

const int64_t x_at = b * x_strides[0] + c * x_strides[2] + j * x_strides[3];
const int64_t x_step = x_strides[1];
const int64_t h_at = int64_t(b) * N * D + f;
const int64_t mask_at = b * mask_strides[0];
const int64_t reset_at = b * reset_strides[0];
const float lambda = decay[c];
const float lambda_rest = decay[C + c];

// The first segment writes in pass 0, the others in pass 1.
for (int pass = 0; pass < (S > 1 ? 2 : 1); ++pass) {
  const bool writes = pass == (s > 0 ? 1 : 0);
  float state = 0.0f;
  float rest = 0.0f;
  if (pass == 1) {
    threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  }
  if (writes && on) {
    state = s > 0 ? left[0][lane] : h0[b * h0_strides[0] + c * h0_strides[1] + j * h0_strides[2]];
    for (int k = 1; k < s; ++k) {
      // Selected, not scaled by zero: a state that was cut may be infinite.
      const float part = kept[k][lane];
      state = part < 0.0f ? left[k][lane] : metal::fma(part, state, left[k][lane]);
    }
  }

  const int stop = writes || (pass == 0 && s < S - 1) ? end : begin;
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
        if (writes) {
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

  if (S > 1 && pass == 0) {
    left[s][lane] = state + rest;
    const float part = count == 0 ? 1.0f : metal::precise::exp2(count * decay[2 * C + c]);
    kept[s][lane] = cut ? -1.0f : part;
  }
  if (writes && on && s == S - 1) {
    last[int64_t(b) * D + f] = state + rest;
  }
}
