"""The C source of the CPU kernels, which `cpu_mmmamba` compiles: a decoding step of a layer, and quantised products.

Read top to bottom: vectors, dtypes, matrices and their products by tiles of 16 rows, the parts of a step, and the
functions that Python calls. Letters as in `ssm_mmmamba`: B rows of the batch, H query heads, K key/value heads, P head
size, W convolution taps. All sums are in fp32; weights of 4 and 8 bits are multiplied with inputs that are rounded to
8 bits in groups of 32, so that products are sums of integers. The source is a string because a Hub package consists of
Python files. GCC and Clang; vectors are theirs, only the integer products are written for AVX-512, AVX2 and any other.
"""

SOURCE = r"""
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define GROUP 32     /* inputs that share a scale */
#define TILE 16      /* rows of a matrix that are multiplied together: one vector of results */
#define AHEAD 4096   /* bytes: how far ahead of its use a weight is asked for */
#ifdef __AVX512F__
#define MOST_INPUTS 16  /* inputs whose sums stay in registers while a tile is read once */
#else
#define MOST_INPUTS 4
#endif

/* --- vectors ---------------------------------------------------------------------------------------------------- */

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int8_t i8x16 __attribute__((vector_size(16)));

INLINE f32x16 load(const float *p) { f32x16 v; memcpy(&v, p, sizeof v); return v; }
INLINE void store(float *p, f32x16 v) { memcpy(p, &v, sizeof v); }
INLINE f32x16 all(float x) { return x - (f32x16){0}; }
INLINE f32x16 load_bf16(const uint16_t *p) {
  u16x16 v; memcpy(&v, p, sizeof v);
  return (f32x16)(__builtin_convertvector(v, u32x16) << 16);
}
INLINE float sum(f32x16 v) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)v);
#else
  float part[16];
  store(part, v);
  for (int i = 8; i; i >>= 1)
    for (int j = 0; j < i; j++) part[j] += part[j + i];
  return part[0];
#endif
}

/* Where `first`, a, else b. */
INLINE f32x16 choose(i32x16 first, f32x16 a, f32x16 b) {
  return (f32x16)((first & (i32x16)a) | (~first & (i32x16)b));
}
INLINE f32x16 larger(f32x16 a, f32x16 b) { return choose(a > b, a, b); }

/* Nearest integers of numbers below 2^22: the sum with 1.5 * 2^23 has them in its last bits. */
INLINE i32x16 nearest(f32x16 v) { return (i32x16)(v + 12582912.f) - 0x4B400000; }

/* exp by 2^n * 2^f with |f| <= 1/2, 2^f by its series; at most 2 units in the last place, NaN of NaN. Below -87 it is
   1e-38; from 88.4 on infinite. */
INLINE f32x16 exp16(f32x16 x) {
  x = choose(x < -87.f, all(-87.f), x);
  x = choose(x > 89.f, all(89.f), x);
  f32x16 y = x * 1.44269504f;
  i32x16 n = nearest(y);
  f32x16 whole = __builtin_convertvector(n, f32x16);
  f32x16 f = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  f32x16 p = all(1.f / 5040);
  p = p * f + 1.f / 720; p = p * f + 1.f / 120; p = p * f + 1.f / 24;
  p = p * f + 1.f / 6; p = p * f + 0.5f; p = p * f + 1.f; p = p * f + 1.f;
  return p * (f32x16)((u32x16)(n + 127) << 23);
}
INLINE f32x16 silu(f32x16 x) { return x / (1.f + exp16(-x)); }

/* --- tensors in fp32 or bf16 ------------------------------------------------------------------------------------ */

enum { F32, BF16, INT4, INT8 };

typedef struct { const void *data; int64_t dtype; } vector;

INLINE float bf16_to_float(uint16_t x) { uint32_t bits = (uint32_t)x << 16; float y; memcpy(&y, &bits, 4); return y; }
INLINE uint16_t float_to_bf16(float x) {
  uint32_t bits; memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;  /* not a number */
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
INLINE float get(vector v, int64_t i) {
  return v.dtype == F32 ? ((const float *)v.data)[i] : bf16_to_float(((const uint16_t *)v.data)[i]);
}
INLINE f32x16 get16(vector v, int64_t i) {
  return v.dtype == F32 ? load((const float *)v.data + i) : load_bf16((const uint16_t *)v.data + i);
}
INLINE void put(void *data, int64_t dtype, int64_t i, float x) {
  if (dtype == F32) ((float *)data)[i] = x;
  else ((uint16_t *)data)[i] = float_to_bf16(x);
}

/* --- products --------------------------------------------------------------------------------------------------- */

/* (rows, columns), row-major in fp32 and bf16. Quantised: for each tile of 16 rows and group of 32 columns a block of
   16 scales in fp16 and the integers, four columns of a row side by side; `quantization_mmmamba` has the format. */
typedef struct { const void *weight; vector bias; int64_t rows, columns, kind; } matrix;

/* Inputs of a product: fp32, and for quantised matrices the same as integers times a scale per group. */
typedef struct { float *values; int8_t *integers; float *scales; int32_t *sums; int64_t width; } inputs;

INLINE int64_t is_quantised(const matrix *m) { return m->kind >= INT4; }

/* Work of all threads: groups of inputs, rounded to integers from -127 to 127. A group with a number that is NaN or
   infinite has the scale NaN, so that every product of it is. */
static void round_inputs(const inputs *x, int64_t count) {
  #pragma omp for schedule(static)
  for (int64_t g = 0; g < count * x->width / GROUP; g++) {
    f32x16 a = load(x->values + g * GROUP), b = load(x->values + g * GROUP + 16);
    float zero_or_nan = sum(a * 0.f + b * 0.f);  /* 0 or NaN */
    if (zero_or_nan != 0) a = b = all(0);
    f32x16 high = larger(larger(a, -a), larger(b, -b));
    float most = 0;
    for (int i = 0; i < 16; i++) most = high[i] > most ? high[i] : most;
    float inverse = most > 1e-30f ? 127.f / most : 0.f;  /* of less it would be infinite */
    i32x16 p = nearest(a * inverse), q = nearest(b * inverse);
    i8x16 low = __builtin_convertvector(p, i8x16), up = __builtin_convertvector(q, i8x16);
    memcpy(x->integers + g * GROUP, &low, 16);
    memcpy(x->integers + g * GROUP + 16, &up, 16);
    i32x16 both = p + q;
    int32_t total = 0;
    for (int i = 0; i < 16; i++) total += both[i];
    x->sums[g] = total;
    x->scales[g] = most / 127.f + zero_or_nan;
  }
}

INLINE f32x16 scales_of_block(const uint8_t *block) {
#ifdef __AVX512F__
  return (f32x16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)block));
#elif defined(__F16C__)
  f32x16 v;
  __m256 low = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)block));
  __m256 up = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)block + 1));
  memcpy(&v, &low, 32); memcpy((char *)&v + 32, &up, 32);
  return v;
#else
  u16x16 half; memcpy(&half, block, 32);
  u32x16 wide = __builtin_convertvector(half, u32x16);
  /* The exponent's bias differs by 112; the product does the same for what is too small for a whole exponent. */
  f32x16 v = (f32x16)((wide & 0x7fff) << 13) * 0x1p112f;
  return (f32x16)((u32x16)v | (wide & 0x8000) << 16);
#endif
}

/* The integers of a block, as they are multiplied, and their products with the 32 inputs of a group: `start` plus the
   sum of stored integer times input, for each of 16 rows. */
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

typedef struct { __m512i of[8]; } integers;  /* four columns each */

INLINE integers unpack(const uint8_t *block, int kind) {
  integers w;
  for (int s = 0; s < (kind == INT4 ? 4 : 8); s++) {
    __m512i stored = _mm512_loadu_si512(block + 64 * s);
    if (kind == INT8) { w.of[s] = stored; continue; }
    w.of[2 * s] = _mm512_and_si512(stored, _mm512_set1_epi8(15));
    w.of[2 * s + 1] = _mm512_and_si512(_mm512_srli_epi16(stored, 4), _mm512_set1_epi8(15));
  }
  return w;
}

INLINE i32x16 dot(const integers *w, const int8_t *x, int32_t start, int kind) {
  (void)kind;
  __m512i total = _mm512_set1_epi32(start);
  for (int s = 0; s < 8; s++) {
    int32_t four; memcpy(&four, x + 4 * s, 4);
    total = _mm512_dpbusd_epi32(total, w->of[s], _mm512_set1_epi32(four));
  }
  return (i32x16)total;
}

#elif defined(__AVX2__)

typedef struct { __m256i of[8][2]; } integers;  /* four columns of eight rows each */

INLINE integers unpack(const uint8_t *block, int kind) {
  integers w;
  for (int s = 0; s < (kind == INT4 ? 4 : 8); s++)
    for (int h = 0; h < 2; h++) {
      __m256i stored = _mm256_loadu_si256((const __m256i *)(block + 64 * s + 32 * h));
      if (kind == INT8) { w.of[s][h] = _mm256_xor_si256(stored, _mm256_set1_epi8((char)128)); continue; }
      w.of[2 * s][h] = _mm256_and_si256(stored, _mm256_set1_epi8(15));
      w.of[2 * s + 1][h] = _mm256_and_si256(_mm256_srli_epi16(stored, 4), _mm256_set1_epi8(15));
    }
  return w;
}

INLINE i32x16 dot(const integers *w, const int8_t *x, int32_t start, int kind) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i total[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
  for (int s = 0; s < 8; s++) {
    int32_t four; memcpy(&four, x + 4 * s, 4);
    __m256i inputs = _mm256_set1_epi32(four);
    for (int h = 0; h < 2; h++) {
      if (kind == INT4) {  /* 16 products of at most 15 * 127 fit into 16 bits */
        total[h] = _mm256_add_epi16(total[h], _mm256_maddubs_epi16(w->of[s][h], inputs));
        continue;
      }
      /* The instruction wants one factor unsigned: the weights' sign goes over to the inputs. */
      __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w->of[s][h]), _mm256_sign_epi8(inputs, w->of[s][h]));
      total[h] = _mm256_add_epi32(total[h], _mm256_madd_epi16(pairs, ones));
    }
  }
  if (kind == INT4)
    for (int h = 0; h < 2; h++) total[h] = _mm256_madd_epi16(total[h], ones);
  else  /* these integers were stored with 128 added, which is in `start` */
    for (int c = 0; c < GROUP; c++) start += 128 * x[c];
  i32x16 both;
  memcpy(&both, total, sizeof both);
  return both + start;
}

#else

typedef struct { uint8_t of[8][TILE][4]; } integers;  /* four columns of a row each */

INLINE integers unpack(const uint8_t *block, int kind) {
  integers w;
  if (kind == INT8) {
    memcpy(&w, block, sizeof w);
    return w;
  }
  for (int s = 0; s < 4; s++)
    for (int i = 0; i < 64; i++) {
      w.of[2 * s][i / 4][i % 4] = block[64 * s + i] & 15;
      w.of[2 * s + 1][i / 4][i % 4] = block[64 * s + i] >> 4;
    }
  return w;
}

INLINE i32x16 dot(const integers *w, const int8_t *x, int32_t start, int kind) {
  (void)kind;
  i32x16 total = (i32x16){0} + start;
  for (int s = 0; s < 8; s++)
    for (int r = 0; r < TILE; r++)
      for (int j = 0; j < 4; j++) total[r] += w->of[s][r][j] * x[4 * s + j];
  return total;
}

#endif

/* Tile `t` of a quantised matrix times `count` inputs from number `first` on. */
INLINE void quantised_tile(
    const matrix *m, const inputs *x, int64_t t, int64_t first, int count, int kind, f32x16 *out) {
  const int64_t groups = m->columns / GROUP, bytes = 2 * TILE + (kind == INT4 ? 4 : 8) * 64;
  const int32_t zero = kind == INT4 ? 8 : 128;
  const uint8_t *block = (const uint8_t *)m->weight + t * groups * bytes;
  const int8_t *of_inputs = x->integers + first * m->columns;
  const float *scales = x->scales + first * groups;
  const int32_t *sums = x->sums + first * groups;
  for (int i = 0; i < count; i++) out[i] = all(0);
  for (int64_t g = 0; g < groups; g++, block += bytes) {
    if (count <= 4)  /* longer loops leave the processor time to look ahead itself */
      for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(block + AHEAD + line);
    integers w = unpack(block + 2 * TILE, kind);
    f32x16 of_rows = scales_of_block(block);
    for (int i = 0; i < count; i++) {
      i32x16 total = dot(&w, of_inputs + i * m->columns + g * GROUP, -zero * sums[i * groups + g], kind);
      out[i] += __builtin_convertvector(total, f32x16) * (of_rows * scales[i * groups + g]);
    }
  }
}

/* Row `r` of a matrix in fp32 or bf16 times `count` inputs. */
INLINE void dense_row(const matrix *m, const inputs *x, int64_t r, int64_t first, int count, int kind, float *out) {
  const int64_t width = m->columns, whole = width / 16 * 16;
  const float *single = (const float *)m->weight + r * width;
  const uint16_t *half = (const uint16_t *)m->weight + r * width;
  f32x16 total[MOST_INPUTS][2];
  for (int i = 0; i < count; i++) total[i][0] = total[i][1] = all(0);
  int64_t c = 0;
  for (; c + 32 <= width; c += 32) {
    f32x16 a = kind == F32 ? load(single + c) : load_bf16(half + c);
    f32x16 b = kind == F32 ? load(single + c + 16) : load_bf16(half + c + 16);
    const char *now = kind == F32 ? (const char *)(single + c) : (const char *)(half + c);
    __builtin_prefetch(now + AHEAD);
    if (kind == F32) __builtin_prefetch(now + AHEAD + 64);
    for (int i = 0; i < count; i++) {
      total[i][0] += a * load(x->values + (first + i) * width + c);
      total[i][1] += b * load(x->values + (first + i) * width + c + 16);
    }
  }
  for (; c < whole; c += 16) {
    f32x16 a = kind == F32 ? load(single + c) : load_bf16(half + c);
    for (int i = 0; i < count; i++) total[i][0] += a * load(x->values + (first + i) * width + c);
  }
  for (int i = 0; i < count; i++) {
    float rest = sum(total[i][0] + total[i][1]);
    for (c = whole; c < width; c++)
      rest += (kind == F32 ? single[c] : bf16_to_float(half[c])) * x->values[(first + i) * width + c];
    out[i] = rest;
  }
}

INLINE void tile_of_kind(
    const matrix *m, const inputs *x, int64_t t, int64_t first, int count, int kind, f32x16 *out) {
  if (kind >= INT4) {
    quantised_tile(m, x, t, first, count, kind, out);
    return;
  }
  for (int i = 0; i < count; i++) out[i] = all(0);  /* the last tile may have fewer rows */
  for (int lane = 0; lane < TILE && t * TILE + lane < m->rows; lane++) {
    float of_row[MOST_INPUTS];
    dense_row(m, x, t * TILE + lane, first, count, kind, of_row);
    for (int i = 0; i < count; i++) out[i][lane] = of_row[i];
  }
}

/* One function for each kind and number of inputs, so that sums stay in registers. */
#define OF_COUNT(kind, count) case count: tile_of_kind(m, x, t, first, count, kind, out); break;
#ifdef __AVX512F__
#define OF_KIND(kind) case kind: switch (count) { \
  OF_COUNT(kind, 1) OF_COUNT(kind, 2) OF_COUNT(kind, 4) OF_COUNT(kind, 8) OF_COUNT(kind, 16) } break;
#else
#define OF_KIND(kind) case kind: switch (count) { OF_COUNT(kind, 1) OF_COUNT(kind, 2) OF_COUNT(kind, 4) } break;
#endif
static void tile_of(const matrix *m, const inputs *x, int64_t t, int64_t first, int count, f32x16 *out) {
  switch (m->kind) { OF_KIND(F32) OF_KIND(BF16) OF_KIND(INT4) OF_KIND(INT8) }
}

/* Rows of tile `t` times `count` inputs, at most MOST_INPUTS, bias added. */
static void tile(const matrix *m, const inputs *x, int64_t t, int64_t first, int64_t count, f32x16 *out) {
  for (int64_t i = 0; i < count;) {
    int step = MOST_INPUTS;
    while (step > count - i) step /= 2;
    tile_of(m, x, t, first + i, step, out + i);
    i += step;
  }
  if (m->bias.data)
    for (int64_t i = 0; i < count; i++)
      for (int r = 0; r < TILE && t * TILE + r < m->rows; r++) out[i][r] += get(m->bias, t * TILE + r);
}

int omp_get_max_threads(void);

static int most_threads = 1;
void set_most_threads(int64_t count) { most_threads = (int)count; }

/* As many threads as torch would take, but no more than there are cores for. */
static int num_threads(void) {
  int wanted = omp_get_max_threads();
  return wanted < most_threads ? wanted : most_threads;
}

INLINE int64_t num_tiles(const matrix *m) { return (m->rows + TILE - 1) / TILE; }

/* Tiles that a thread takes at once: long stretches of memory, but several for each thread. */
static int64_t some_tiles(const matrix *m) {
  int64_t some = num_tiles(m) / (4 * num_threads());
  return some < 1 ? 1 : some > 32 ? 32 : some;
}

/* Work of all threads: y (count, rows) in fp32 or bf16, of few inputs; `added`, of y's shape, is added if given. */
static void product(const matrix *m, const inputs *x, int64_t count, void *y, int64_t dtype, vector added) {
  #pragma omp for schedule(dynamic, some_tiles(m))
  for (int64_t t = 0; t < num_tiles(m); t++)
    for (int64_t first = 0; first < count; first += MOST_INPUTS) {
      int64_t some = count - first < MOST_INPUTS ? count - first : MOST_INPUTS;
      f32x16 out[MOST_INPUTS];
      tile(m, x, t, first, some, out);
      for (int64_t i = 0; i < some; i++)
        for (int r = 0; r < TILE && t * TILE + r < m->rows; r++) {
          int64_t place = (first + i) * m->rows + t * TILE + r;
          put(y, dtype, place, added.data ? out[i][r] + get(added, place) : out[i][r]);
        }
    }
}

/* --- parts of a decoding step, each the work of all threads ----------------------------------------------------- */

/* y (count, width) = RMSNorm of x (arXiv 1910.07467). */
static void rmsnorm(vector x, int64_t count, int64_t width, vector weight, float eps, float *y) {
  #pragma omp for schedule(static)
  for (int64_t b = 0; b < count; b++) {
    f32x16 total = all(0);
    int64_t c = 0;
    for (; c + 16 <= width; c += 16) { f32x16 v = get16(x, b * width + c); total += v * v; }
    float squares = sum(total);
    for (; c < width; c++) { float v = get(x, b * width + c); squares += v * v; }
    float scale = 1.f / sqrtf(squares / width + eps);
    for (c = 0; c + 16 <= width; c += 16) store(y + b * width + c, get16(x, b * width + c) * scale * get16(weight, c));
    for (; c < width; c++) y[b * width + c] = get(x, b * width + c) * scale * get(weight, c);
  }
}

/* What a layer needs beside its states. */
typedef struct {
  int64_t hidden, heads, kv_heads, head_size, taps, mlp, dtype;
  double norm_eps, mixer_eps, mlp_eps;
  matrix in_proj, q_proj, k_proj, v_proj, out_proj, gate_proj, up_proj, down_proj;
  vector norm, mlp_norm, conv_weight, conv_bias, A_log, dt_bias, mixer_norm;
} layer;

/* Inputs of the convolution's channels from..from + P of row b, after it and SiLU; the state moves on. */
INLINE void convolve(const layer *l, const float *projected, void *state, int64_t from, float *out) {
  const int64_t size = l->head_size, past = l->taps - 1;
  vector before = {state, l->dtype};
  for (int64_t i = 0; i < size; i++) {
    int64_t channel = from + i;
    float now = projected[channel], total = get(l->conv_bias, channel);
    for (int64_t tap = 0; tap < past; tap++)
      total += get(l->conv_weight, channel * l->taps + tap) * get(before, channel * past + tap);
    out[i] = total + get(l->conv_weight, channel * l->taps + past) * now;
    for (int64_t tap = 0; tap + 1 < past; tap++)
      put(state, l->dtype, channel * past + tap, get(before, channel * past + tap + 1));
    if (past) put(state, l->dtype, channel * past + past - 1, now);
  }
  int64_t i = 0;
  for (; i + 16 <= size; i += 16) store(out + i, silu(load(out + i)));
  for (; i < size; i++) out[i] = out[i] / (1.f + expf(-out[i]));
}

/* One step of the mixer between its projections (arXiv 2502.13145, eq. 2): projected (B, C + H P + H), conv_state
   (B, C, W - 1), state (B, H, P, P) in fp32, y (B, H, P). One piece of work per row and key/value head. */
static void mixer_step(
    const layer *l, const float *projected, int64_t count, void *conv_state, float *state, float *y) {
  const int64_t size = l->head_size, kv = l->kv_heads * size, inner = l->heads * size, group = l->heads / l->kv_heads;
  const int64_t channels = 2 * kv + inner, width = channels + inner + l->heads;
  #pragma omp for schedule(dynamic, 1)
  for (int64_t piece = 0; piece < count * l->kv_heads; piece++) {
    int64_t b = piece / l->kv_heads, k_head = piece % l->kv_heads;
    const float *row = projected + b * width;
    char *conv = (char *)conv_state + b * channels * (l->taps - 1) * (l->dtype == F32 ? 4 : 2);
    float v[size], k[size], q[size];
    convolve(l, row, conv, k_head * size, v);
    convolve(l, row, conv, kv + k_head * size, k);
    for (int64_t h = k_head * group; h < (k_head + 1) * group; h++) {
      convolve(l, row, conv, 2 * kv + h * size, q);
      float step = row[channels + inner + h] + get(l->dt_bias, h);
      step = step > 20.f ? step : log1pf(expf(step));
      float decay = expf(-expf(get(l->A_log, h)) * step), squares = 0;
      float *out = y + (b * l->heads + h) * size;
      for (int64_t p = 0; p < size; p++) {
        float *s = state + ((b * l->heads + h) * size + p) * size, written = step * v[p], rest = 0;
        f32x16 total = all(0);
        int64_t n = 0;
        for (; n + 16 <= size; n += 16) {
          f32x16 now = load(s + n) * decay + load(k + n) * written;
          store(s + n, now);
          total += now * load(q + n);
        }
        for (; n < size; n++) { s[n] = s[n] * decay + k[n] * written; rest += s[n] * q[n]; }
        out[p] = sum(total) + rest;
        squares += out[p] * out[p];
      }
      float scale = 1.f / sqrtf(squares / size + (float)l->mixer_eps);
      const float *gate = row + channels + h * size;
      int64_t p = 0;
      for (; p + 16 <= size; p += 16)
        store(out + p, load(out + p) * scale * get16(l->mixer_norm, p) * silu(load(gate + p)));
      for (; p < size; p++) out[p] *= scale * get(l->mixer_norm, p) * gate[p] / (1.f + expf(-gate[p]));
    }
  }
}

/* y (count, MLP width) = silu(gate x) * (up x) (arXiv 2002.05202). */
static void gated(const layer *l, const inputs *x, int64_t count, float *y) {
  #pragma omp for schedule(dynamic, some_tiles(&l->gate_proj))
  for (int64_t t = 0; t < num_tiles(&l->gate_proj); t++)
    for (int64_t first = 0; first < count; first += MOST_INPUTS) {
      int64_t some = count - first < MOST_INPUTS ? count - first : MOST_INPUTS;
      f32x16 gate[MOST_INPUTS], up[MOST_INPUTS];
      tile(&l->gate_proj, x, t, first, some, gate);
      tile(&l->up_proj, x, t, first, some, up);
      for (int64_t i = 0; i < some; i++) {
        f32x16 out = silu(gate[i]) * up[i];
        for (int r = 0; r < TILE && t * TILE + r < l->mlp; r++) y[(first + i) * l->mlp + t * TILE + r] = out[r];
      }
    }
}

/* x (B, heads, P) -> (B, heads, P) in `dtype`: rotary positions (arXiv 2104.09864), cos and sin (B, P). */
static void rotate(const layer *l, const float *x, int64_t count, int64_t heads, vector cos, vector sin, void *y) {
  const int64_t size = l->head_size, half = size / 2;
  #pragma omp for schedule(static)
  for (int64_t piece = 0; piece < count * heads; piece++) {
    const float *in = x + piece * size;
    int64_t b = piece / heads;
    for (int64_t i = 0; i < size; i++) {
      float other = i < half ? -in[i + half] : in[i - half];
      put(y, l->dtype, piece * size + i, in[i] * get(cos, b * size + i) + other * get(sin, b * size + i));
    }
  }
}

/* Keys and values of all tokens: (B, K, tokens, P), their last dimension contiguous, strides in numbers. */
typedef struct {
  vector keys, values;
  int64_t tokens, key_row, key_head, key_token, value_row, value_head, value_token;
} past;

#define SEGMENT 512  /* tokens that are attended to in one piece of work */

INLINE f32x16 read16(vector v, int64_t i, int64_t dtype) {
  return dtype == F32 ? load((const float *)v.data + i) : load_bf16((const uint16_t *)v.data + i);
}

/* Scores of some tokens for some heads: keys from number `at` on, `next` apart; query (heads, size). */
INLINE void score(
    vector keys, int64_t at, int64_t next, const float *query, int64_t size, int tokens, int heads, int64_t dtype,
    float *scores, int64_t per_head) {
  f32x16 total[2][4];
  for (int g = 0; g < heads; g++)
    for (int t = 0; t < tokens; t++) total[g][t] = all(0);
  int64_t i = 0;
  for (; i + 16 <= size; i += 16)
    for (int t = 0; t < tokens; t++) {
      f32x16 key = read16(keys, at + t * next + i, dtype);
      for (int g = 0; g < heads; g++) total[g][t] += key * load(query + g * size + i);
    }
  for (int g = 0; g < heads; g++)
    for (int t = 0; t < tokens; t++) {
      float rest = sum(total[g][t]);
      for (int64_t j = i; j < size; j++) rest += get(keys, at + t * next + j) * query[g * size + j];
      scores[g * per_head + t] = rest;
    }
}

/* Sums of weighted values of all tokens of a segment, of some heads, for 16 * `parts` of their numbers. */
INLINE void add_values(
    vector values, int64_t at, int64_t next, const float *weights, int64_t per_head, int64_t tokens, int heads,
    int parts, int64_t dtype, float *out, int64_t head_stride) {
  f32x16 total[2][4];
  for (int g = 0; g < heads; g++)
    for (int i = 0; i < parts; i++) total[g][i] = all(0);
  for (int64_t t = 0; t < tokens; t++)
    for (int i = 0; i < parts; i++) {
      f32x16 value = read16(values, at + t * next + 16 * i, dtype);
      for (int g = 0; g < heads; g++) total[g][i] += value * weights[g * per_head + t];
    }
  for (int g = 0; g < heads; g++)
    for (int i = 0; i < parts; i++) store(out + g * head_stride + 16 * i, total[g][i]);
}

/* Some heads of a segment: what `attend` keeps of it in `out`, `head_stride` apart; query (heads, size). */
INLINE void attend_segment(
    const past *p, int64_t key, int64_t value, int64_t tokens, const float *query, int64_t size, int heads,
    int64_t dtype, float *out, int64_t head_stride) {
  float weights[2 * (SEGMENT + 16)];
  const int64_t per_head = SEGMENT + 16;
  int64_t t = 0;
  for (; t + 4 <= tokens; t += 4)
    score(p->keys, key + t * p->key_token, p->key_token, query, size, 4, heads, dtype, weights + t, per_head);
  for (; t < tokens; t++)
    score(p->keys, key + t * p->key_token, p->key_token, query, size, 1, heads, dtype, weights + t, per_head);
  for (int g = 0; g < heads; g++) {
    float *of_head = weights + g * per_head, most = of_head[0], total = 0;
    for (t = 1; t < tokens; t++) most = of_head[t] > most ? of_head[t] : most;
    for (t = tokens; t % 16; t++) of_head[t] = most;
    for (t = 0; t < tokens; t += 16) store(of_head + t, exp16(load(of_head + t) - most));
    for (t = 0; t < tokens; t++) total += of_head[t];
    out[g * head_stride + size] = most;
    out[g * head_stride + size + 1] = total;
  }
  int64_t i = 0;
  for (; i + 64 <= size; i += 64)
    add_values(p->values, value + i, p->value_token, weights, per_head, tokens, heads, 4, dtype, out + i, head_stride);
  for (; i + 16 <= size; i += 16)
    add_values(p->values, value + i, p->value_token, weights, per_head, tokens, heads, 1, dtype, out + i, head_stride);
  for (; i < size; i++)
    for (int g = 0; g < heads; g++) {
      float total = 0;
      for (t = 0; t < tokens; t++) total += get(p->values, value + t * p->value_token + i) * weights[g * per_head + t];
      out[g * head_stride + i] = total;
    }
}

/* Softmax attention of one token per row: q (B, H, P); `parts` holds for each head and segment P sums, the greatest
   score and the sum of weights; y (B, H, P). */
static void attend(const layer *l, int64_t count, vector q, const past *p, float *parts, float *y) {
  const int64_t size = l->head_size, group = l->heads / l->kv_heads, segments = (p->tokens + SEGMENT - 1) / SEGMENT;
  const int64_t part = size + 2, per_head = segments * part;
  const float scaling = 1.f / sqrtf((float)size);
  #pragma omp for schedule(dynamic, 1)
  for (int64_t piece = 0; piece < count * l->kv_heads * segments; piece++) {
    int64_t segment = piece % segments, k_head = piece / segments % l->kv_heads, b = piece / segments / l->kv_heads;
    int64_t start = segment * SEGMENT, tokens = p->tokens - start < SEGMENT ? p->tokens - start : SEGMENT;
    int64_t key = b * p->key_row + k_head * p->key_head + start * p->key_token;
    int64_t value = b * p->value_row + k_head * p->value_head + start * p->value_token;
    for (int64_t g = 0; g < group;) {  /* two heads at a time read keys and values once */
      int64_t head = b * l->heads + k_head * group + g, heads = group - g < 2 ? 1 : 2;
      float query[2 * size], *out = parts + head * per_head + segment * part;
      for (int64_t i = 0; i < heads * size; i++) query[i] = get(q, head * size + i) * scaling;
#define SEGMENT_OF(heads, dtype) attend_segment(p, key, value, tokens, query, size, heads, dtype, out, per_head)
      if (p->keys.dtype == F32 && heads == 2) SEGMENT_OF(2, F32);
      else if (p->keys.dtype == F32) SEGMENT_OF(1, F32);
      else if (heads == 2) SEGMENT_OF(2, BF16);
      else SEGMENT_OF(1, BF16);
      g += heads;
    }
  }
  #pragma omp for schedule(static)
  for (int64_t head = 0; head < count * l->heads; head++) {
    const float *of_head = parts + head * per_head;
    float most = of_head[size], weights = 0;
    for (int64_t s = 1; s < segments; s++) most = of_head[s * part + size] > most ? of_head[s * part + size] : most;
    for (int64_t i = 0; i < size; i++) y[head * size + i] = 0;
    for (int64_t s = 0; s < segments; s++) {
      float share = expf(of_head[s * part + size] - most);
      weights += share * of_head[s * part + size + 1];
      for (int64_t i = 0; i < size; i++) y[head * size + i] += share * of_head[s * part + i];
    }
    for (int64_t i = 0; i < size; i++) y[head * size + i] /= weights;
  }
}

/* --- working memory --------------------------------------------------------------------------------------------- */

INLINE char *take(char **memory, int64_t bytes) {
  char *taken = *memory;
  *memory += (bytes + 63) / 64 * 64;
  return taken;
}

static inputs new_inputs(char **memory, int64_t count, int64_t width) {
  inputs x;
  x.width = width;
  x.values = (float *)take(memory, count * width * 4);
  x.integers = (int8_t *)take(memory, count * width);
  x.scales = (float *)take(memory, count * (width / GROUP) * 4);
  x.sums = (int32_t *)take(memory, count * (width / GROUP) * 4);
  return x;
}

static int64_t bytes_of_inputs(int64_t count, int64_t width) { return count * width * 6 + 256; }

/* --- what Python calls ------------------------------------------------------------------------------------------ */

int64_t bytes_for_layer(const layer *l, int64_t count) {
  int64_t inner = l->heads * l->head_size;
  return bytes_of_inputs(count, l->hidden) + bytes_of_inputs(count, inner) + bytes_of_inputs(count, l->mlp)
       + count * 4 * (l->in_proj.rows + l->hidden) + 512;
}

/* The second half of a layer: y (count, hidden) = x + mlp(norm(x)). */
static void mlp_of(const layer *l, int64_t count, const float *x, char *memory, void *y) {
  vector sum_so_far = {x, F32};
  inputs normed = new_inputs(&memory, count, l->hidden), wide = new_inputs(&memory, count, l->mlp);
  rmsnorm(sum_so_far, count, l->hidden, l->mlp_norm, (float)l->mlp_eps, normed.values);
  if (is_quantised(&l->gate_proj) || is_quantised(&l->up_proj)) round_inputs(&normed, count);
  gated(l, &normed, count, wide.values);
  if (is_quantised(&l->down_proj)) round_inputs(&wide, count);
  product(&l->down_proj, &wide, count, y, l->dtype, sum_so_far);
}

/* One token per row through a Mamba-2 layer: x and y (count, hidden), states as in mixer_step. */
void layer_step(const layer *l, int64_t count, const void *x, void *conv_state, float *state, void *y, char *memory) {
  #pragma omp parallel num_threads(num_threads())
  {
    char *unused = memory;  /* every thread computes the same places */
    vector entering = {x, l->dtype};
    float *projected = (float *)take(&unused, count * 4 * l->in_proj.rows);
    float *mixed = (float *)take(&unused, count * 4 * l->hidden);
    char *rest = unused;
    inputs normed = new_inputs(&unused, count, l->hidden);
    inputs heads = new_inputs(&unused, count, l->heads * l->head_size);
    rmsnorm(entering, count, l->hidden, l->norm, (float)l->norm_eps, normed.values);
    if (is_quantised(&l->in_proj)) round_inputs(&normed, count);
    product(&l->in_proj, &normed, count, projected, F32, (vector){0});
    mixer_step(l, projected, count, conv_state, state, heads.values);
    if (is_quantised(&l->out_proj)) round_inputs(&heads, count);
    product(&l->out_proj, &heads, count, mixed, F32, entering);
    mlp_of(l, count, mixed, rest, y);
  }
}

int64_t bytes_for_projections(const layer *l, int64_t count) {
  return bytes_of_inputs(count, l->hidden) + count * 4 * (l->heads + 2 * l->kv_heads) * l->head_size + 512;
}

/* The first part of an attention layer, for one token per row: x (count, hidden) to q (count, H, P), k and v (count,
   K, P), q and k rotated by cos and sin (count, P). */
void attention_projections(
    const layer *l, int64_t count, const void *x, const void *cos, const void *sin, void *q, void *k, void *v,
    char *memory) {
  #pragma omp parallel num_threads(num_threads())
  {
    char *unused = memory;
    vector entering = {x, l->dtype}, cosines = {cos, l->dtype}, sines = {sin, l->dtype};
    inputs normed = new_inputs(&unused, count, l->hidden);
    float *wide_q = (float *)take(&unused, count * 4 * l->q_proj.rows), *wide_k = (float *)unused;
    rmsnorm(entering, count, l->hidden, l->norm, (float)l->norm_eps, normed.values);
    if (is_quantised(&l->q_proj) || is_quantised(&l->k_proj) || is_quantised(&l->v_proj)) round_inputs(&normed, count);
    product(&l->q_proj, &normed, count, wide_q, F32, (vector){0});
    product(&l->k_proj, &normed, count, wide_k, F32, (vector){0});
    product(&l->v_proj, &normed, count, v, l->dtype, (vector){0});
    rotate(l, wide_q, count, l->heads, cosines, sines, q);
    rotate(l, wide_k, count, l->kv_heads, cosines, sines, k);
  }
}

int64_t bytes_for_attention(const layer *l, int64_t count, const past *p) {
  int64_t segments = (p->tokens + SEGMENT - 1) / SEGMENT, inner = l->heads * l->head_size;
  return count * l->heads * segments * (l->head_size + 2) * 4 + bytes_of_inputs(count, inner)
       + bytes_of_inputs(count, l->hidden) + bytes_of_inputs(count, l->mlp) + count * 4 * l->hidden + 512;
}

/* The rest of it: q (count, H, P) and what was read so far to y (count, hidden). */
void attention_step(
    const layer *l, int64_t count, const void *x, const void *q, const past *p, void *y, char *memory) {
  int64_t segments = (p->tokens + SEGMENT - 1) / SEGMENT;
  #pragma omp parallel num_threads(num_threads())
  {
    char *unused = memory;
    vector entering = {x, l->dtype}, query = {q, l->dtype};
    float *parts = (float *)take(&unused, count * l->heads * segments * (l->head_size + 2) * 4);
    float *mixed = (float *)take(&unused, count * 4 * l->hidden);
    char *rest = unused;
    inputs heads = new_inputs(&unused, count, l->heads * l->head_size);
    attend(l, count, query, p, parts, heads.values);
    if (is_quantised(&l->out_proj)) round_inputs(&heads, count);
    product(&l->out_proj, &heads, count, mixed, F32, entering);
    mlp_of(l, count, mixed, rest, y);
  }
}

/* The mixer's part alone: see ssm_mmmamba.decode_step. */
void decode_step(
    const layer *l, int64_t count, const void *projected, void *conv_state, float *state, void *y, float *memory) {
  int64_t inner = l->heads * l->head_size, width = 2 * inner + 2 * l->kv_heads * l->head_size + l->heads;
  vector given = {projected, l->dtype};
  float *wide = memory, *out = memory + count * width;
  #pragma omp parallel num_threads(num_threads())
  {
    #pragma omp for schedule(static)
    for (int64_t i = 0; i < count * width; i++) wide[i] = get(given, i);
    mixer_step(l, wide, count, conv_state, state, out);
    #pragma omp for schedule(static)
    for (int64_t i = 0; i < count * inner; i++) put(y, l->dtype, i, out[i]);
  }
}

int64_t bytes_for_product(const matrix *m, int64_t count) { return bytes_of_inputs(count, m->columns); }

/* y (count, rows) = x (count, columns) times the matrix, both in `dtype`. Of many inputs a block at a time meets four
   tiles, which stay in a core's cache as long as there are inputs. */
void multiply(const matrix *m, int64_t count, const void *x, void *y, int64_t dtype, char *memory) {
  const int64_t tiles_at_once = count > MOST_INPUTS ? 4 : some_tiles(m), tiles = num_tiles(m);
  vector given = {x, dtype};
  inputs in = new_inputs(&memory, count, m->columns);
  #pragma omp parallel num_threads(num_threads())
  {
    #pragma omp for schedule(static)
    for (int64_t i = 0; i < count * m->columns / 16; i++) store(in.values + 16 * i, get16(given, 16 * i));
    #pragma omp for schedule(static)
    for (int64_t i = count * m->columns / 16 * 16; i < count * m->columns; i++) in.values[i] = get(given, i);
    if (is_quantised(m)) round_inputs(&in, count);
    #pragma omp for schedule(dynamic, 1)
    for (int64_t start = 0; start < tiles; start += tiles_at_once)
      for (int64_t first = 0; first < count; first += MOST_INPUTS)
        for (int64_t t = start; t < start + tiles_at_once && t < tiles; t++) {
          int64_t some = count - first < MOST_INPUTS ? count - first : MOST_INPUTS;
          f32x16 out[MOST_INPUTS];
          tile(m, &in, t, first, some, out);
          for (int64_t i = 0; i < some; i++)
            for (int r = 0; r < TILE && t * TILE + r < m->rows; r++)
              put(y, dtype, (first + i) * m->rows + t * TILE + r, out[i][r]);
        }
  }
}
"""
