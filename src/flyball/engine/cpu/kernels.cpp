// One decoder step on the CPU: a Llama-shaped stack in bfloat16, from token ids to logits, in one call.
//
// Built by the machine's compiler (see build.py) with -march=native; needs AVX512-BF16. Activations between operators
// are bfloat16, sums and the residual stream are float32. Threads are a team's (team.hpp): a result never depends on who
// computed it.
//
// Symbols: T tokens of a step, N output and K input features, H query heads, KH key-value heads, G = H / KH, D head size.
// A packed weight holds panels of 16 output columns: panel[K / 2][16][2] bf16, what one vdpbf16ps multiplies.

#include "team.hpp"

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using bf16 = uint16_t;
using flyball::Team;

inline float to_float(bf16 x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

inline bf16 to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<bf16>((bits >> 16) | 0x40);  // NaN stays NaN
    return static_cast<bf16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline __m512 load_bf16(const bf16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}

inline __m512 rounded(__m512 x) {  // to what bfloat16 can hold
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)), 16));
}

inline void store_bf16(bf16* p, __m512 x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x)); }

// exp by range reduction to [-ln2/2, ln2/2] and a polynomial of degree 6; relative error below 1e-6.
inline __m512 exp512(__m512 x) {
    x = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(88.0f)), _mm512_set1_ps(-87.0f));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.0f / 720);
    for (const float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    return _mm512_scalef_ps(p, n);
}

// The sums of four vectors.
inline __m128 sums(const __m512* v) {
    const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    const __m512 c = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))),
                                   _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(c), _mm512_extractf32x8_ps(c, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

enum Output { STORE, STORE_FLOAT, ADD_FLOAT, GATED };

struct Target {
    Output kind;
    void* data;      // bf16 or float, row major
    int64_t stride;  // elements a row
    const float* bias;
};

// Put the sums of C panels of one row where they belong. GATED: panels alternate gate, up; writes silu(gate) * up, 16
// columns a pair.
template <int C>
inline void finish(const __m512* acc, int64_t column, int64_t columns, const Target& to, int64_t row) {
    for (int c = 0; c < C; ++c) {
        const int64_t first = column + c * 16;
        __m512 v = acc[c];
        if (to.kind == GATED) {
            if (c % 2) continue;
            const __m512 sigmoid =
                _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_add_ps(_mm512_set1_ps(1.0f), exp512(_mm512_sub_ps(_mm512_setzero_ps(), v))));
            const __m512 up = acc[c + 1 < C ? c + 1 : c];
            store_bf16((bf16*)to.data + row * to.stride + first / 2, _mm512_mul_ps(_mm512_mul_ps(v, sigmoid), up));
            continue;
        }
        const int64_t left = columns - first;
        const __mmask16 mask = left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1);
        if (to.bias) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, to.bias + first));
        const int64_t at = row * to.stride + first;
        if (to.kind == STORE) {
            _mm256_mask_storeu_epi16((bf16*)to.data + at, mask, (__m256i)_mm512_cvtneps_pbh(v));
        } else {
            float* out = (float*)to.data + at;
            if (to.kind == ADD_FLOAT) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, out));
            _mm512_mask_storeu_ps(out, mask, v);
        }
    }
}

// R rows times C panels of 16 columns.
// AHEAD: bring the C panels at `ahead` into the L2 cache on the way.
template <int R, int C, bool AHEAD>
inline void tile(const bf16* x, int64_t ldx, const bf16* w, int64_t k, int64_t column, int64_t columns, const Target& to,
                 int64_t row, const bf16* ahead) {
    __m512 acc[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) acc[r][c] = _mm512_setzero_ps();
    const int64_t panel = k * 16;
    for (int64_t i = 0; i < k; i += 2) {
        __m512bh b[C];
        for (int c = 0; c < C; ++c) {
            b[c] = (__m512bh)_mm512_loadu_si512(w + c * panel + i * 16);
            if (R == 1) _mm_prefetch((const char*)(w + c * panel + i * 16 + 512), _MM_HINT_T0);
            if (AHEAD) _mm_prefetch((const char*)(ahead + c * panel + i * 16), _MM_HINT_T1);
        }
        for (int r = 0; r < R; ++r) {
            int32_t pair;
            std::memcpy(&pair, x + r * ldx + i, 4);
            const __m512bh a = (__m512bh)_mm512_set1_epi32(pair);
            for (int c = 0; c < C; ++c) acc[r][c] = _mm512_dpbf16_ps(acc[r][c], b[c], a);
        }
    }
    for (int r = 0; r < R; ++r) finish<C>(acc[r], column, columns, to, row + r);
}

template <int R>
inline void tile_columns(int c, const bf16* x, int64_t ldx, const bf16* w, int64_t k, int64_t column, int64_t columns,
                         const Target& to, int64_t row, const bf16* ahead = nullptr) {
    switch (c) {
        case 4:
            return ahead ? tile<R, 4, true>(x, ldx, w, k, column, columns, to, row, ahead)
                         : tile<R, 4, false>(x, ldx, w, k, column, columns, to, row, ahead);
        case 3: return tile<R, 3, false>(x, ldx, w, k, column, columns, to, row, ahead);
        case 2: return tile<R, 2, false>(x, ldx, w, k, column, columns, to, row, ahead);
        default: return tile<R, 1, false>(x, ldx, w, k, column, columns, to, row, ahead);
    }
}

// x [M, K] bf16 times a packed weight [K, N], in chunks that any thread may take. A chunk is a block of columns, whose
// weights stay in L2, times a block of rows; within it each four panels meet all rows before the next four, so that a
// row block is read from L2 as well.
struct Linear {
    const bf16* x;
    int64_t m, k;
    const bf16* w;
    int64_t n;
    Target to;

    static constexpr int64_t L2_ELEMENTS = 256 * 1024;  // half a megabyte of weights
    int64_t panels() const { return (n + 15) / 16; }
    int64_t groups() const { return (panels() + 3) / 4; }
    int64_t rows_a_chunk() const { return m > 96 ? 48 : m >= 24 ? ((m + 1) / 2 + 5) / 6 * 6 : m; }
    int64_t row_blocks() const { return (m + rows_a_chunk() - 1) / rows_a_chunk(); }
    int64_t groups_a_chunk() const { return m > 96 ? std::clamp<int64_t>(L2_ELEMENTS / (64 * k), 1, 8) : 1; }
    int64_t chunks() const {
        return m == 0 ? 0 : (groups() + groups_a_chunk() - 1) / groups_a_chunk() * row_blocks();
    }

    void chunk(int64_t i) const {
        const int64_t block = i / row_blocks(), rows = i % row_blocks() * rows_a_chunk();
        const int64_t end = std::min(m, rows + rows_a_chunk());
        const int64_t last = std::min(groups(), (block + 1) * groups_a_chunk());
        for (int64_t group = block * groups_a_chunk(); group < last; ++group) {
            const int64_t panel = group * 4;
            const int c = (int)std::min<int64_t>(4, panels() - panel);
            const bf16* weights = w + panel * 16 * k;
            const bf16* next = group + 1 < groups() && panels() - panel >= 8 ? weights + 64 * k : nullptr;
            int64_t row = rows;
            for (; row + 6 <= end; row += 6)  // the second tile has its weights at hand and time to fetch the next ones
                tile_columns<6>(c, x + row * k, k, weights, k, panel * 16, n, to, row, row == rows + 6 ? next : nullptr);
            switch (end - row) {
                case 5: tile_columns<5>(c, x + row * k, k, weights, k, panel * 16, n, to, row); break;
                case 4: tile_columns<4>(c, x + row * k, k, weights, k, panel * 16, n, to, row); break;
                case 3: tile_columns<3>(c, x + row * k, k, weights, k, panel * 16, n, to, row); break;
                case 2: tile_columns<2>(c, x + row * k, k, weights, k, panel * 16, n, to, row); break;
                case 1: tile_columns<1>(c, x + row * k, k, weights, k, panel * 16, n, to, row); break;
                default: break;
            }
        }
    }
};

float mean_square(const float* x, int64_t n) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += 16) {
        const __m512 v = _mm512_loadu_ps(x + i);
        sum = _mm512_fmadd_ps(v, v, sum);
    }
    return _mm512_reduce_add_ps(sum) / (float)n;
}

// y = x / rms(x) * weight for one row of n, a multiple of 16; x float, y bf16.
void rms_norm(const float* x, int64_t n, const float* weight, float eps, bf16* y) {
    const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(mean_square(x, n) + eps));
    for (int64_t i = 0; i < n; i += 16) {
        const __m512 v = _mm512_mul_ps(_mm512_loadu_ps(x + i), scale);
        store_bf16(y + i, _mm512_mul_ps(v, _mm512_loadu_ps(weight + i)));
    }
}

// Rotate one head in place of its two halves (the rotate-half form of transformers); optional norm of the head before.
void rope_head(const bf16* in, int64_t d, const float* cos, const float* sin, const float* norm, float eps, bf16* out) {
    float x[512];
    for (int64_t i = 0; i < d; i += 16) _mm512_storeu_ps(x + i, load_bf16(in + i));
    if (norm) {
        const float scale = 1.0f / std::sqrt(mean_square(x, d) + eps);
        for (int64_t i = 0; i < d; ++i) x[i] = x[i] * scale * norm[i];
    }
    const int64_t half = d / 2;
    for (int64_t i = 0; i < half; ++i) {
        const float a = x[i], b = x[i + half];
        out[i] = to_bf16(a * cos[i] - b * sin[i]);
        out[i + half] = to_bf16(b * cos[i + half] + a * sin[i + half]);
    }
}

}  // namespace

extern "C" {

struct FbLayer {
    const bf16 *qkv, *o, *gate_up, *down;           // packed
    const float *qkv_bias, *o_bias;                 // or null
    const float *norm_in, *norm_post;               // [hidden]
    const float *q_norm, *k_norm;                   // [D] or null
    bf16 *keys, *values;                            // cache [slots, KH, D]
    int64_t window;                                 // 0: none
};

struct FbModel {
    int64_t layers, hidden, heads, kv_heads, head_dim, intermediate, vocab, block_size;
    float eps, scaling;
    const void* embedding;        // [vocab, hidden] bf16, or int8 where it has scales
    const float* norm;            // [hidden]
    const bf16* head;             // packed [hidden, vocab]
    const float *cos, *sin;       // [positions, D]
    const FbLayer* layer;
    const float* embedding_scales;  // [vocab] or null
};

struct FbStep {
    int64_t tokens, samples, table_width, longest, threads;
    const int32_t *ids, *positions, *sequence;      // [T]
    const int32_t* tables;                          // [sequences, table_width]
    const int32_t* sampled;                         // [samples] rows whose logits are wanted
    float* logits;                                  // [samples, vocab]
    char* scratch;                                  // fb_scratch_bytes(...)
};

int64_t fb_packed_elements(int64_t n, int64_t k) { return (n + 15) / 16 * 16 * k; }

// w [N, K] bf16, K even. gated: w is gate over up, each [N / 2, K], and panels alternate between them.
void fb_pack(const bf16* w, int64_t n, int64_t k, int gated, bf16* out, int64_t threads) {
    const auto pack = [=](int64_t panel) {
        const int64_t first = gated ? (panel / 2) * 16 + (panel % 2) * (n / 2) : panel * 16;
        for (int64_t i = 0; i < k; i += 2)
            for (int64_t c = 0; c < 16; ++c)
                for (int64_t s = 0; s < 2; ++s)
                    out[(panel * (k / 2) + i / 2) * 32 + c * 2 + s] =
                        !gated && panel * 16 + c >= n ? 0 : w[(first + c) * k + i + s];
    };
    Team::instance().run((int)threads, [=](Team::Walk& team) { team.phase((n + 15) / 16, pack); });
}

// y [M, N] float = x [M, K] times a packed weight; for tests and for measuring one linear alone.
void fb_linear(const bf16* x, int64_t m, int64_t k, const bf16* w, int64_t n, float* y, int64_t threads) {
    const Linear linear{x, m, k, w, n, Target{STORE_FLOAT, y, n, nullptr}};
    Team::instance().run((int)threads, [=](Team::Walk& team) {
        team.phase(linear.chunks(), [&](int64_t i) { linear.chunk(i); });
    });
}

// To be called before what a model points to is freed: a helper that came late may still look at it.
void fb_drain() { Team::instance().drain(); }

}  // extern "C"

namespace {

constexpr int64_t FEW_ROWS = 64;  // up to here every thread norms all rows for itself, which is cheaper than to meet
constexpr int64_t ROWS = 16;      // rows a chunk where rows are independent

// Where a step's intermediate values lie. Everything a job touches is in here by value, as a late thread may look.
struct Job {
    FbModel m;
    FbStep step;
    float *residual, *scores;
    bf16 *normed, *qkv, *q, *seen, *inner;
    int64_t row_floats;
    bool alone;  // every sequence has one token in this step

    int64_t group() const { return m.heads / m.kv_heads; }
    int64_t qkv_width() const { return (m.heads + 2 * m.kv_heads) * m.head_dim; }
    bool few(int64_t rows) const { return rows <= FEW_ROWS; }

    // Lay the parts out from `base` on, which may be null to learn their size.
    int64_t place(char* base) {
        int64_t used = 0;
        const auto take = [&](int64_t bytes) {
            char* here = base ? base + used : nullptr;
            used += (bytes + 63) & ~63LL;
            return here;
        };
        const int64_t t = step.tokens;
        row_floats = ((step.longest + 15) & ~15LL) + 16;
        residual = (float*)take(t * m.hidden * 4);
        normed = (bf16*)take((few(t) ? t * step.threads : t) * m.hidden * 2);
        qkv = (bf16*)take(t * qkv_width() * 2);
        q = (bf16*)take(t * m.heads * m.head_dim * 2);
        seen = (bf16*)take(t * m.heads * m.head_dim * 2);
        inner = (bf16*)take(t * m.intermediate * 2);
        scores = (float*)take(step.threads * group() * row_floats * 4);
        return used + 64;
    }

    void embed(int64_t chunk) const {
        for (int64_t row = chunk * ROWS; row < std::min(step.tokens, (chunk + 1) * ROWS); ++row) {
            const int64_t id = step.ids[row], from = id * m.hidden;
            float* out = residual + row * m.hidden;
            if (m.embedding_scales) {
                const __m512 scale = _mm512_set1_ps(m.embedding_scales[id]);
                for (int64_t i = 0; i < m.hidden; i += 16) {
                    const __m128i codes = _mm_loadu_si128((const __m128i*)((const int8_t*)m.embedding + from + i));
                    const __m512 v = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)), scale);
                    _mm512_storeu_ps(out + i, rounded(v));
                }
            } else {
                for (int64_t i = 0; i < m.hidden; i += 16)
                    _mm512_storeu_ps(out + i, load_bf16((const bf16*)m.embedding + from + i));
            }
        }
    }

    // Norm `rows` rows of the residual stream (those that `which` names) and multiply by a packed weight.
    void normed_linear(Team::Walk& team, int64_t rows, const int32_t* which, const float* weight, const bf16* w, int64_t n,
                       const Target& to) const {
        const auto row = [&](int64_t i, bf16* out) {
            rms_norm(residual + (which ? which[i] : i) * m.hidden, m.hidden, weight, m.eps, out + i * m.hidden);
        };
        bf16* mine = normed + (few(rows) && few(step.tokens) ? team.slot() * step.tokens * m.hidden : 0);
        const bool own = few(rows) && few(step.tokens);
        bool ready = !own;
        if (!own)
            team.phase((rows + ROWS - 1) / ROWS, [&](int64_t chunk) {
                for (int64_t i = chunk * ROWS; i < std::min(rows, (chunk + 1) * ROWS); ++i) row(i, mine);
            });
        const Linear linear{mine, rows, m.hidden, w, n, to};
        team.phase(linear.chunks(), [&](int64_t i) {
            if (!ready)
                for (int64_t r = 0; r < rows; ++r) row(r, mine);
            ready = true;
            linear.chunk(i);
        });
    }

    static void plain_linear(Team::Walk& team, const Linear& linear) {
        team.phase(linear.chunks(), [&](int64_t i) { linear.chunk(i); });
    }

    const int32_t* table(int64_t row) const { return step.tables + step.sequence[row] * step.table_width; }

    // Rotate a token's key and its queries of one key-value head, and put key and value into the cache.
    void rope(const FbLayer& layer, int64_t row, int64_t head) const {
        const int64_t d = m.head_dim, p = step.positions[row];
        const float *cos = m.cos + p * d, *sin = m.sin + p * d;
        const bf16* in = qkv + row * qkv_width();
        const int64_t slot =
            ((int64_t)table(row)[p / m.block_size] * m.block_size + p % m.block_size) * m.kv_heads * d + head * d;
        for (int64_t h = head * group(); h < (head + 1) * group(); ++h)
            rope_head(in + h * d, d, cos, sin, layer.q_norm, m.eps, q + (row * m.heads + h) * d);
        rope_head(in + (m.heads + head) * d, d, cos, sin, layer.k_norm, m.eps, layer.keys + slot);
        std::memcpy(layer.values + slot, in + (m.heads + m.kv_heads + head) * d, (size_t)d * sizeof(bf16));
    }

    // Attend a token, with the queries of one key-value head, to its own past through the block table.
    void attend(const FbLayer& layer, int64_t token, int64_t head, float* s) const {
        const int64_t d = m.head_dim, size = m.block_size, stride = m.kv_heads * d, lanes = d / 32;
        const int64_t last = step.positions[token];
        const int64_t from = layer.window > 0 ? std::max<int64_t>(0, last - layer.window + 1) : 0;
        const int64_t count = last - from + 1;
        const int32_t* blocks = table(token);
        const bf16* queries = q + (token * m.heads + head * group()) * d;
        for (int64_t g0 = 0; g0 < group(); g0 += 4) {  // up to four query heads share each key that is read
            const int64_t heads = std::min<int64_t>(4, group() - g0);
            for (int64_t i = 0; i < count; i += 4) {  // four positions at a time; what lies past the end is masked later
                const bf16* keys[4];
                for (int64_t j = 0; j < 4; ++j) {
                    const int64_t p = from + std::min(i + j, count - 1);
                    keys[j] = layer.keys + ((int64_t)blocks[p / size] * size + p % size) * stride + head * d;
                }
                for (int64_t g = 0; g < heads; ++g) {
                    __m512 acc[4];
                    for (auto& a : acc) a = _mm512_setzero_ps();
                    for (int64_t l = 0; l < lanes; ++l) {
                        const __m512bh query = (__m512bh)_mm512_loadu_si512(queries + (g0 + g) * d + l * 32);
                        for (int64_t j = 0; j < 4; ++j)
                            acc[j] = _mm512_dpbf16_ps(acc[j], (__m512bh)_mm512_loadu_si512(keys[j] + l * 32), query);
                    }
                    _mm_storeu_ps(s + (g0 + g) * row_floats + i, sums(acc));
                }
            }
        }
        for (int64_t g = 0; g < group(); ++g) softmax(s + g * row_floats, count);
        for (int64_t g0 = 0; g0 < group(); g0 += 4) {
            const int64_t heads = std::min<int64_t>(4, group() - g0);
            for (int64_t part = 0; part < d; part += 64) {
                const int64_t width = std::min<int64_t>(4, (d - part) / 16);
                __m512 acc[4][4];
                for (auto& a : acc)
                    for (auto& v : a) v = _mm512_setzero_ps();
                for (int64_t i = 0; i < count; ++i) {
                    const int64_t p = from + i;
                    const bf16* value =
                        layer.values + ((int64_t)blocks[p / size] * size + p % size) * stride + head * d + part;
                    __m512 v[4];
                    for (int64_t l = 0; l < width; ++l) v[l] = load_bf16(value + l * 16);
                    for (int64_t g = 0; g < heads; ++g) {
                        const __m512 weight = _mm512_set1_ps(s[(g0 + g) * row_floats + i]);
                        for (int64_t l = 0; l < width; ++l) acc[g][l] = _mm512_fmadd_ps(weight, v[l], acc[g][l]);
                    }
                }
                for (int64_t g = 0; g < heads; ++g) {
                    const __m512 inverse = _mm512_set1_ps(s[(g0 + g) * row_floats + ((count + 15) & ~15LL)]);
                    bf16* to = seen + (token * m.heads + head * group() + g0 + g) * d + part;
                    for (int64_t l = 0; l < width; ++l) store_bf16(to + l * 16, _mm512_mul_ps(acc[g][l], inverse));
                }
            }
        }
    }

    // Exponentials of scaled scores in place, less the largest; one over their sum goes behind the padded row.
    void softmax(float* row, int64_t count) const {
        for (int64_t i = count; i < ((count + 15) & ~15LL); ++i) row[i] = -INFINITY;
        __m512 top = _mm512_set1_ps(-INFINITY);
        for (int64_t i = 0; i < count; i += 16) top = _mm512_max_ps(top, _mm512_loadu_ps(row + i));
        const __m512 scale = _mm512_set1_ps(m.scaling);
        const __m512 shift = _mm512_set1_ps(_mm512_reduce_max_ps(top) * m.scaling);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t i = 0; i < count; i += 16) {
            const __m512 raw = _mm512_loadu_ps(row + i);
            const __mmask16 real = _mm512_cmp_ps_mask(raw, _mm512_set1_ps(-INFINITY), _CMP_GT_OQ);
            const __m512 e = _mm512_maskz_mov_ps(real, exp512(_mm512_fmsub_ps(raw, scale, shift)));
            _mm512_storeu_ps(row + i, e);
            sum = _mm512_add_ps(sum, e);
        }
        row[(count + 15) & ~15LL] = 1.0f / _mm512_reduce_add_ps(sum);
    }

    void attention(Team::Walk& team, const FbLayer& layer) const {
        const int64_t kv = m.kv_heads, items = step.tokens * kv, grain = items > 1024 ? 16 : items > 64 ? 4 : 1;
        float* s = scores + team.slot() * group() * row_floats;
        if (!alone)  // a later token of a sequence reads the keys of earlier ones
            team.phase((step.tokens + ROWS - 1) / ROWS, [&](int64_t chunk) {
                for (int64_t row = chunk * ROWS; row < std::min(step.tokens, (chunk + 1) * ROWS); ++row)
                    for (int64_t head = 0; head < kv; ++head) rope(layer, row, head);
            });
        team.phase((items + grain - 1) / grain, [&](int64_t chunk) {
            for (int64_t item = chunk * grain; item < std::min(items, (chunk + 1) * grain); ++item) {
                if (alone) rope(layer, item / kv, item % kv);
                attend(layer, item / kv, item % kv, s);
            }
        });
    }

    void operator()(Team::Walk& team) const {
        const int64_t t = step.tokens, hidden = m.hidden, width = m.heads * m.head_dim;
        team.phase((t + ROWS - 1) / ROWS, [&](int64_t chunk) { embed(chunk); });
        for (int64_t l = 0; l < m.layers; ++l) {
            const FbLayer& layer = m.layer[l];
            normed_linear(team, t, nullptr, layer.norm_in, layer.qkv, qkv_width(),
                          Target{STORE, qkv, qkv_width(), layer.qkv_bias});
            attention(team, layer);
            plain_linear(team, {seen, t, width, layer.o, hidden, Target{ADD_FLOAT, residual, hidden, layer.o_bias}});
            normed_linear(team, t, nullptr, layer.norm_post, layer.gate_up, 2 * m.intermediate,
                          Target{GATED, inner, m.intermediate, nullptr});
            plain_linear(team, {inner, t, m.intermediate, layer.down, hidden, Target{ADD_FLOAT, residual, hidden, nullptr}});
        }
        normed_linear(team, step.samples, step.sampled, m.norm, m.head, m.vocab,
                      Target{STORE_FLOAT, step.logits, m.vocab, nullptr});
    }
};

}  // namespace

extern "C" {

int64_t fb_scratch_bytes(const FbModel* model, int64_t tokens, int64_t longest, int64_t threads) {
    Job job{};
    job.m = *model;
    job.step.tokens = tokens;
    job.step.longest = longest;
    job.step.threads = threads;
    return job.place(nullptr);
}

void fb_forward(const FbModel* m, const FbStep* step) {
    Job job{};
    job.m = *m;
    job.step = *step;
    job.alone = true;
    for (int64_t row = 1; row < step->tokens; ++row) job.alone &= step->sequence[row] != step->sequence[row - 1];
    job.place((char*)(((uintptr_t)step->scratch + 63) & ~(uintptr_t)63));
    Team::instance().run((int)step->threads, job);
}

}  // extern "C"
