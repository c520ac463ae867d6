// decay_scan_grad: the adjoint of decay_scan, backwards in time. With g_N = dlast and, for n < N,
//
//   dx_n = lambda g_{n+1},   g_n = dx_n + dh_n       and dh0 = g_0;
//   g_n = 0                  where token n restarts the state
//   dx_n = 0,   g_n = g_{n+1} + dh_n                 where no token exists.
//
//   dh     (B, N, C, Dc)  float, float16_t or bfloat16_t
//   decay  (3, C)         float: lambda, what rounding it to float lost, log2(lambda)
//   dlast  (B, C, Dc)     float
//   mask   (B, N, 8)      bool: false where no token exists           read only if HAS_MASK
//   reset  (B, N, 8)      bool: true where the state restarts at 0    read only if HAS_RESET
//   dx     (B, N, C, Dc)  T
//   dh0    (B, C, Dc)     float
//
// Inputs are read in the strides they have.
// Template: T; int S, segments of time; bool HAS_MASK, HAS_RESET.
// Grid (C Dc rounded up to 32, S, B), threadgroup (32, S, 1): one lane per feature, neighbouring
// lanes on neighbouring features, one simdgroup per segment, time in registers. No atomics: every
// output has one writer, so a run repeats bit for bit.
//
// Segments as in decay_scan, from the end: the last knows its start at once and the first leaves
// nothing behind, so both are read once and are twice as long as the others.
//
// Bytes per element of dh, dh being w and dx v wide: w + v if S = 1, the least; else
// 2 w S / (S + 2) + v. Masks add one byte per token, shared by the 32 lanes.
//
// Each number of the recurrence is a pair of floats, a value and the rest its roundings lost.

constexpr int AHEAD = 8;  // tokens a thread loads before it needs the first
threadgroup float left[S][32];  // what a segment leaves to the one before it, begun at zero
threadgroup float kept[S][32];  // the part of its start that it keeps; negative if it was cut

const int lane = thread_position_in_threadgroup.x;
const int s = thread_position_in_threadgroup.y;
const int f = thread_position_in_grid.x;  // c Dc + j
const int b = thread_position_in_grid.z;
const int N = dh_shape[1];
const int C = dh_shape[2];
const int Dc = dh_shape[3];
const int D = C * Dc;
const bool on = f < D;  // a lane past the last feature still meets the barrier
const int c = on ? f / Dc : 0;
const int j = on ? f % Dc : 0;

const int unit = (N + S + 1) / (S + 2);  // of a segment; the first and the last have two
const int begin = metal::min((s > 0 ? s + 1 : 0) * unit, N);
const int end = on ? metal::min((s < S - 1 ? s + 2 : S + 2) * unit, N) : begin;

const int64_t dh_at = b * dh_strides[0] + c * dh_strides[2] + j * dh_strides[3];
const int64_t dh_step = dh_strides[1];
const int64_t dx_at = int64_t(b) * N * D + f;
const int64_t mask_at = b * mask_strides[0];
const int64_t reset_at = b * reset_strides[0];
const float lambda = decay[c];
const float lambda_rest = decay[C + c];

// The last segment writes in pass 0, the others in pass 1.
for (int pass = 0; pass < (S > 1 ? 2 : 1); ++pass) {
  const bool writes = pass == (s < S - 1 ? 1 : 0);
  float g = 0.0f;
  float rest = 0.0f;
  if (pass == 1) {
    threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  }
  if (writes && on) {
    g = s < S - 1 ? left[S - 1][lane]
                  : dlast[b * dlast_strides[0] + c * dlast_strides[1] + j * dlast_strides[2]];
    for (int k = S - 2; k > s; --k) {
      // Selected, not scaled by zero: what was cut may be infinite.
      const float part = kept[k][lane];
      g = part < 0.0f ? left[k][lane] : metal::fma(part, g, left[k][lane]);
    }
  }

  const int stop = writes || (pass == 0 && s > 0) ? begin : end;
  int count = 0;  // tokens that exist
  bool cut = false;
  for (int n = end - 1; n >= stop; n -= AHEAD) {
    float v[AHEAD];
#pragma clang loop unroll(full)
    for (int k = 0; k < AHEAD; ++k) {
      v[k] = n - k >= stop ? static_cast<float>(dh[dh_at + (n - k) * dh_step]) : 0.0f;
    }
#pragma clang loop unroll(full)
    for (int k = 0; k < AHEAD; ++k) {
      if (n - k >= stop) {
        const bool exists = !HAS_MASK || mask[mask_at + (n - k) * mask_strides[1]];
        if (exists) {
          const float scaled = lambda * g;
          rest = metal::fma(lambda, rest, metal::fma(lambda, g, -scaled) + lambda_rest * g);
          g = scaled;
          ++count;
        }
        if (writes) {
          dx[dx_at + int64_t(n - k) * D] = static_cast<T>(exists ? g + rest : 0.0f);
        }
        if (HAS_RESET && exists && reset[reset_at + (n - k) * reset_strides[1]]) {
          g = rest = 0.0f;
          cut = true;
        } else {
          const float sum = g + v[k];
          const float gained = sum - g;
          rest += (g - (sum - gained)) + (v[k] - gained);  // what the sum lost
          g = sum;
        }
      }
    }
  }

  if (S > 1 && pass == 0) {
    left[s][lane] = g + rest;
    const float part = count == 0 ? 1.0f : metal::precise::exp2(count * decay[2 * C + c]);
    kept[s][lane] = cut ? -1.0f : part;
  }
  if (writes && on && s == 0) {
    dh0[int64_t(b) * D + f] = g + rest;
  }
}
