// The parts of an INT8 linear that torch would make many passes over memory for: norm and modulation or activation, smoothing, rotation and
// quantization of a row in one, and scales, bias, gate, residual and cast of the accumulator in one. See reference.py for what they compute.
// And the product itself, for processors on which torch has none: oneDNN's takes 30 times as long as fp32's on AVX2 without VNNI.
// Plain C interface, no torch headers: compiles in a second, and any torch can load it.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

enum Act { NONE = 0, GELU_TANH = 1, SWIGLU = 2 };

inline float from_bits(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }
inline uint32_t bits(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }

struct BF16 { uint16_t u; };
inline float load(float v) { return v; }
inline float load(BF16 v) { return from_bits(static_cast<uint32_t>(v.u) << 16); }
inline void store(float* p, float v) { *p = v; }
inline void store(BF16* p, float v) {
    uint32_t u = bits(v);
    p->u = static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);  // to nearest even
}

// exp(x) to 2e-7 relative, without a branch, so that loops over it vectorize (Cephes' expf).
inline float exp_(float x) {
    x = x < -87.f ? -87.f : (x > 88.f ? 88.f : x);
    float n = __builtin_rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    return p * from_bits(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}

// x * sigmoid(t); NaN stays NaN, since x is a factor.
inline float gated(float x, float t) { return x / (1.f + exp_(-t)); }
// tanh(u) = 2 sigmoid(2u) - 1, so gelu_tanh(x) = x * sigmoid(2u).
inline float gelu(float x) { return gated(x, 1.5957691216f * (x + 0.044715f * x * x * x)); }

// One stage of the regular Hadamard transform: y_i = (x_0 + x_1 + x_2 + x_3) / 2 - x_{3-i}, of values that lie `stride` apart.
template <int STRIDE>
inline void stage(float* x, int n) {
    for (int base = 0; base < n; base += 4 * STRIDE)
        for (int j = 0; j < STRIDE; ++j) {
            float *p = x + base + j, a = p[0], b = p[STRIDE], c = p[2 * STRIDE], d = p[3 * STRIDE];
            float h = (a + b + c + d) * .5f;
            p[0] = h - d; p[STRIDE] = h - c; p[2 * STRIDE] = h - b; p[3 * STRIDE] = h - a;
        }
}

inline void transpose16(const float* x, float* y) {
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 16; ++j) y[j * 16 + i] = x[i * 16 + j];
}

void rotate(float* x, int group) {
    if (group == 256) {  // H16 (x) H16: both halves with long strides, which vectorize
        float t[256];
        stage<16>(x, 256); stage<64>(x, 256);
        transpose16(x, t);
        stage<16>(t, 256); stage<64>(t, 256);
        transpose16(t, x);
    } else {
        stage<1>(x, group); stage<4>(x, group);
        if (group == 64) stage<16>(x, group);
    }
}

// See reference.Normed; each may be null. factor and shift: one row of k values for each run of `rows` rows of x; factor has its 1.
struct Normed {
    const float *mean, *rstd, *weight, *bias, *factor, *shift;
    int64_t rows_of_factor, rows_of_shift;
};

// Rounded after each step, as one pass a step does.
inline void norm(float* v, int64_t i, int64_t k, const Normed& n) {
    if (n.mean) { const float a = n.mean[i]; for (int64_t j = 0; j < k; ++j) v[j] -= a; }
    if (n.rstd) { const float a = n.rstd[i]; for (int64_t j = 0; j < k; ++j) v[j] *= a; }
    if (n.weight) for (int64_t j = 0; j < k; ++j) v[j] *= n.weight[j];
    if (n.bias) for (int64_t j = 0; j < k; ++j) v[j] += n.bias[j];
    if (n.factor) { const float* a = n.factor + i / n.rows_of_factor * k; for (int64_t j = 0; j < k; ++j) v[j] *= a[j]; }
    if (n.shift) { const float* a = n.shift + i / n.rows_of_shift * k; for (int64_t j = 0; j < k; ++j) v[j] += a[j]; }
}

template <typename T>
void quant_rows(const T* x, int64_t m, int64_t k, int64_t stride, const Normed* normed, int group, int act, const float* scale,
                float min_scale, int8_t* q, float* s) {
#pragma omp parallel
    {
        std::vector<float> row(k);
        float* v = row.data();
#pragma omp for
        for (int64_t i = 0; i < m; ++i) {
            const T* p = x + i * stride;
            if (act == NONE)
                for (int64_t j = 0; j < k; ++j) v[j] = load(p[j]);
            else if (act == GELU_TANH)
                for (int64_t j = 0; j < k; ++j) v[j] = gelu(load(p[j]));
            else
                for (int64_t j = 0; j < k; ++j) { float g = load(p[j]); v[j] = gated(g, g) * load(p[k + j]); }
            if (normed) norm(v, i, k, *normed);
            if (scale)
                for (int64_t j = 0; j < k; ++j) v[j] *= scale[j];
            if (group)
                for (int64_t j = 0; j < k; j += group) rotate(v + j, group);
            uint32_t amax = 0;  // of the bits: NaN and infinity win
            for (int64_t j = 0; j < k; ++j) { uint32_t b = bits(v[j]) & 0x7fffffff; amax = b > amax ? b : amax; }
            float si = from_bits(amax) / 127.f;
            si = si < min_scale ? min_scale : si;
            s[i] = si;
            int8_t* o = q + i * k;
            for (int64_t j = 0; j < k; ++j) o[j] = static_cast<int8_t>(static_cast<int32_t>(__builtin_rintf(v[j] / si)));
        }
    }
}

// What is added to a row: bias, then times gate, then residual.
template <typename T>
void epilogue(const int32_t* acc, int64_t m, int64_t n, const float* s, const float* ws, int64_t ws_step, const float* bias,
              const T* residual, const float* gate, int64_t first, int64_t rows_of_gate, T* y) {
#pragma omp parallel for
    for (int64_t i = 0; i < m; ++i) {
        const int32_t* a = acc + i * n;
        T* o = y + i * n;
        const float si = s[i];
        if (residual) {
            const T* r = residual + i * n;
            const float* g = gate ? gate + (first + i) / rows_of_gate * n : nullptr;
            for (int64_t j = 0; j < n; ++j) {
                float v = static_cast<float>(a[j]) * si * ws[ws_step ? j : 0];
                if (bias) v += bias[j];
                if (g) v *= g[j];
                store(o + j, v + load(r[j]));
            }
        } else if (ws_step == 0) {
            const float w = ws[0];
            for (int64_t j = 0; j < n; ++j) store(o + j, static_cast<float>(a[j]) * si * w + (bias ? bias[j] : 0.f));
        } else if (bias) {
            for (int64_t j = 0; j < n; ++j) store(o + j, static_cast<float>(a[j]) * si * ws[j] + bias[j]);
        } else {
            for (int64_t j = 0; j < n; ++j) store(o + j, static_cast<float>(a[j]) * si * ws[j]);
        }
    }
}

#ifdef __AVX2__
constexpr int ROWS = 6, COLUMNS = 2;  // 12 sums, 2 columns and a row: all 16 registers
constexpr int64_t BLOCK = 64;         // columns whose weights stay in L2

inline int32_t sum(__m256i v) {
    __m128i a = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    a = _mm_add_epi32(a, _mm_shuffle_epi32(a, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(a, _mm_shuffle_epi32(a, 0xb1)));
}

// q [R, k] and w [C, k] -> acc [R, C], rows of which are n apart. Products of 16 bits in pairs: exact.
template <int R, int C>
void tile(const int16_t* q, const int8_t* w, int64_t k, int64_t n, int32_t* acc) {
    __m256i sums[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) sums[r][c] = _mm256_setzero_si256();
    int64_t j = 0;
    for (; j + 16 <= k; j += 16) {
        __m256i column[C];
        for (int c = 0; c < C; ++c)
            column[c] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w + c * k + j)));
        for (int r = 0; r < R; ++r) {
            const __m256i row = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + r * k + j));
            for (int c = 0; c < C; ++c) sums[r][c] = _mm256_add_epi32(sums[r][c], _mm256_madd_epi16(row, column[c]));
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) {
            int32_t total = sum(sums[r][c]);
            for (int64_t i = j; i < k; ++i) total += q[r * k + i] * w[c * k + i];
            acc[r * n + c] = total;
        }
}

template <int C>
void rows_of(int rows, const int16_t* q, const int8_t* w, int64_t k, int64_t n, int32_t* acc) {
    switch (rows) {
        case 1: return tile<1, C>(q, w, k, n, acc);
        case 2: return tile<2, C>(q, w, k, n, acc);
        case 3: return tile<3, C>(q, w, k, n, acc);
        case 4: return tile<4, C>(q, w, k, n, acc);
        case 5: return tile<5, C>(q, w, k, n, acc);
        default: return tile<ROWS, C>(q, w, k, n, acc);
    }
}

void gemm(const int8_t* q, const int8_t* w, int64_t m, int64_t n, int64_t k, int32_t* acc) {
    static thread_local std::vector<int16_t> wide;
    if (wide.size() < static_cast<size_t>(m * k)) wide.resize(m * k);
    int16_t* rows = wide.data();
#pragma omp parallel
    {
#pragma omp for
        for (int64_t i = 0; i < m; ++i)
            for (int64_t j = 0; j < k; ++j) rows[i * k + j] = q[i * k + j];
#pragma omp for
        for (int64_t first = 0; first < n; first += BLOCK) {
            const int64_t last = first + BLOCK < n ? first + BLOCK : n;
            for (int64_t i = 0; i < m; i += ROWS) {
                const int height = m - i < ROWS ? static_cast<int>(m - i) : ROWS;
                int64_t c = first;
                for (; c + COLUMNS <= last; c += COLUMNS) rows_of<COLUMNS>(height, rows + i * k, w + c * k, k, n, acc + i * n + c);
                if (c < last) rows_of<1>(height, rows + i * k, w + c * k, k, n, acc + i * n + c);
            }
        }
    }
}
#endif

}  // namespace

extern "C" {

// x [m, k] ([m, 2k] for SWIGLU) with rows `stride` values apart -> q [m, k], s [m]. normed, scale ([k]): or null.
void int8c_quant_rows(const void* x, int is_bf16, int64_t m, int64_t k, int64_t stride, const void* normed, int group, int act,
                      const float* scale, float min_scale, int8_t* q, float* s) {
    const Normed* n = static_cast<const Normed*>(normed);
    if (is_bf16) quant_rows(static_cast<const BF16*>(x), m, k, stride, n, group, act, scale, min_scale, q, s);
    else quant_rows(static_cast<const float*>(x), m, k, stride, n, group, act, scale, min_scale, q, s);
}

// 0 where int8c_gemm does nothing, 1 where torch has a faster one, 2 where it has not.
int int8c_has_gemm() {
#if defined(__AVX2__) && (defined(__AVX512BW__) || defined(__AVXVNNI__))
    return 1;
#elif defined(__AVX2__)
    return 2;
#else
    return 0;
#endif
}

// q [m, k], w [n, k] -> acc [m, n], their products.
void int8c_gemm(const int8_t* q, const int8_t* w, int64_t m, int64_t n, int64_t k, int32_t* acc) {
#ifdef __AVX2__
    gemm(q, w, m, n, k, acc);
#endif
}

// acc [m, n] -> y [m, n]. ws: [n], or one value with ws_step 0. bias: [n] or null. residual: [m, n] of y's type, or null. gate: one row of n
// values for each run of rows_of_gate rows, counted from `first` at the first of acc; or null.
void int8c_epilogue(const int32_t* acc, int64_t m, int64_t n, const float* s, const float* ws, int64_t ws_step, const float* bias,
                    const void* residual, const float* gate, int64_t first, int64_t rows_of_gate, void* y, int is_bf16) {
    if (is_bf16)
        epilogue(acc, m, n, s, ws, ws_step, bias, static_cast<const BF16*>(residual), gate, first, rows_of_gate, static_cast<BF16*>(y));
    else
        epilogue(acc, m, n, s, ws, ws_step, bias, static_cast<const float*>(residual), gate, first, rows_of_gate, static_cast<float*>(y));
}

}
