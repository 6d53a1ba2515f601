// The decoder step of kernels.cpp on quantised weights: the same phases, other products.
//
// int8_dynamic: rows of x become bytes with a scale of their own and are multiplied as integers (VNNI). The other formats
// keep only the weights in few bits: their codes become bfloat16 in registers, on their way to the product with the first
// rows, which leave four panels of them in the cache for the others; scales come after a group's sum, so that a row's
// result does not depend on who else is in the step.
//
// A panel holds 16 output columns. Codes of a panel, one after the other by K: int8_dynamic [K / 4][16][4] signed bytes;
// int8 and fp8 [K / 2][16][2] bytes; int4 and nf4 [K / 2][16] bytes, the even k in the low half. Scales: [G][16] float.

#include "kernels.cpp"

namespace {

enum Format : int64_t { BF16, INT8_DYNAMIC, INT8, INT4, FP8, NF4 };

// What stands where kernels.cpp has a pointer to packed bfloat16.
struct Weight {
    int64_t format;
    const uint8_t* codes;   // BF16: packed as fb_pack does
    const float* scales;    // [panels][G][16]
    const int32_t* sums;    // [panels][16] of a column's codes, INT8_DYNAMIC
    int64_t group, groups;  // columns of K that share a scale, and how many such groups there are
};

inline int64_t panel_bytes(int64_t format, int64_t k) { return format == INT4 || format == NF4 ? k * 8 : k * 16; }

// bfloat16 of small integers, and of the NF4 levels; the second half repeats the first, so that bit 4 of an index is free.
struct Tables {
    __m512i int4, nf4, fp8_small;
    Tables() {
        alignas(64) bf16 a[32], b[32], c[32];
        const float levels[16] = {-1.0f, -0.6961928f, -0.52507305f, -0.3949175f, -0.28444138f, -0.18477343f, -0.091050036f, 0.0f,
                                  0.0795803f, 0.1609302f, 0.2461123f, 0.33791524f, 0.44070983f, 0.562617f, 0.72295684f, 1.0f};
        for (int i = 0; i < 32; ++i) {
            a[i] = to_bf16((float)(i % 16 - 8));
            b[i] = to_bf16(levels[i % 16]);
            c[i] = to_bf16((float)(i % 8) / 512.0f);  // e4m3 numbers below its smallest normal one
        }
        int4 = _mm512_load_si512(a);
        nf4 = _mm512_load_si512(b);
        fp8_small = _mm512_load_si512(c);
    }
};
const Tables TABLES;

// Two rows of K of one panel, 32 weights, as bfloat16, without their scale.
template <int64_t FORMAT>
inline __m512i pair_of(const uint8_t* p) {
    if (FORMAT == BF16) return _mm512_loadu_si512(p);
    if (FORMAT == INT8) {
        const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
        const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p + 1)));
        return (__m512i)_mm512_cvtne2ps_pbh(high, low);
    }
    if (FORMAT == FP8) {
        const __m512i b = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p));
        const __m512i magnitude = _mm512_and_si512(b, _mm512_set1_epi16(0x7f));
        __m512i v = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16(120 << 7));
        const __mmask32 small = _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(8));
        v = _mm512_mask_permutexvar_epi16(v, small, magnitude, TABLES.fp8_small);
        return _mm512_or_si512(v, _mm512_slli_epi16(_mm512_sub_epi16(b, magnitude), 8));
    }
    const __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm512_permutexvar_epi16(_mm512_or_si512(b, _mm512_slli_epi32(b, 12)), FORMAT == INT4 ? TABLES.int4 : TABLES.nf4);
}

// Bytes of a pair as `pair_of` reads it.
template <int64_t FORMAT>
constexpr int64_t pair_bytes() { return FORMAT == BF16 ? 64 : FORMAT == INT8 || FORMAT == FP8 ? 32 : 16; }

// R rows times C panels, whose codes become bfloat16 in registers or are it already. Sums of a group of columns meet its
// scale: what comes out is the same bit for bit with any R and C, and wherever the codes were widened. KEEP: leave them
// widened in `wide`.
template <int64_t FORMAT, int R, int C, bool KEEP>
void narrow_tile(const bf16* x, const uint8_t* codes, const Weight& w, int64_t panel, int64_t k, int64_t columns,
                 const Target& to, int64_t row, uint8_t* wide) {
    constexpr int64_t STEP = pair_bytes<FORMAT>();
    const int64_t stride = k / 2 * STEP;
    const float* scales = w.scales + panel * w.groups * 16;
    alignas(64) float total[R][C][16];  // rarely touched: the registers are for the sums of a group
    for (int64_t g = 0; g < w.groups; ++g) {
        __m512 acc[R][C];
        for (auto& r : acc)
            for (auto& v : r) v = _mm512_setzero_ps();
        const int64_t end = std::min(k, (g + 1) * w.group);
        for (int64_t i = g * w.group; i < end; i += 2) {
            __m512bh b[C];
            for (int c = 0; c < C; ++c) {
                const uint8_t* at = codes + c * stride + i / 2 * STEP;
                if (R <= 2) _mm_prefetch((const char*)at + 512, _MM_HINT_T0);
                b[c] = (__m512bh)pair_of<FORMAT>(at);
                if (KEEP) _mm512_store_si512(wide + (c * k + i) * 32, (__m512i)b[c]);
            }
            for (int r = 0; r < R; ++r) {
                int32_t pair;
                std::memcpy(&pair, x + r * k + i, 4);
                const __m512bh a = (__m512bh)_mm512_set1_epi32(pair);
                for (int c = 0; c < C; ++c) acc[r][c] = _mm512_dpbf16_ps(acc[r][c], b[c], a);
            }
        }
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c) {
                const __m512 before = g ? _mm512_load_ps(total[r][c]) : _mm512_setzero_ps();
                const __m512 scale = _mm512_loadu_ps(scales + (c * w.groups + g) * 16);
                _mm512_store_ps(total[r][c], _mm512_fmadd_ps(acc[r][c], scale, before));
            }
    }
    for (int r = 0; r < R; ++r) {
        __m512 out[C];
        for (int c = 0; c < C; ++c) out[c] = _mm512_load_ps(total[r][c]);
        finish<C>(out, panel * 16, columns, to, row + r);
    }
}

// R rows of bytes, 128 more than they stand for, times C panels of signed bytes.
template <int R, int C>
void integer(const uint8_t* x, const float* row_scales, const Weight& w, int64_t panel, int64_t k, int64_t columns,
             const Target& to, int64_t row) {
    const uint8_t* codes = w.codes + panel * k * 16;
    __m512i acc[R][C];
    for (int c = 0; c < C; ++c) {
        const __m512i sum = _mm512_loadu_si512(w.sums + (panel + c) * 16);
        for (int r = 0; r < R; ++r) acc[r][c] = _mm512_slli_epi32(_mm512_sub_epi32(_mm512_setzero_si512(), sum), 7);
    }
    for (int64_t i = 0; i < k; i += 4) {
        __m512i b[C];
        for (int c = 0; c < C; ++c) {
            b[c] = _mm512_loadu_si512(codes + c * k * 16 + i * 16);
            if (R == 1) _mm_prefetch((const char*)codes + c * k * 16 + i * 16 + 1024, _MM_HINT_T0);
        }
        for (int r = 0; r < R; ++r) {
            int32_t four;
            std::memcpy(&four, x + r * k + i, 4);
            for (int c = 0; c < C; ++c) acc[r][c] = _mm512_dpbusd_epi32(acc[r][c], _mm512_set1_epi32(four), b[c]);
        }
    }
    for (int r = 0; r < R; ++r) {
        __m512 out[C];
        for (int c = 0; c < C; ++c)
            out[c] = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(acc[r][c]), _mm512_set1_ps(row_scales[r])),
                                   _mm512_loadu_ps(w.scales + (panel + c) * 16));
        finish<C>(out, panel * 16, columns, to, row + r);
    }
}

// A row of n bfloat16 numbers, n a multiple of 16, as bytes with zero at 128; returns the scale.
float quantize_row(const bf16* x, int64_t n, uint8_t* out) {
    __m512 top = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += 16) top = _mm512_max_ps(top, _mm512_abs_ps(load_bf16(x + i)));
    const float most = _mm512_reduce_max_ps(top);
    const __m512 inverse = _mm512_set1_ps(most > 0 ? 127.0f / most : 0.0f);
    for (int64_t i = 0; i < n; i += 16) {
        const __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(load_bf16(x + i), inverse));
        _mm_storeu_si128((__m128i*)(out + i), _mm512_cvtepi32_epi8(_mm512_add_epi32(v, _mm512_set1_epi32(128))));
    }
    return most / 127.0f;
}

// What a thread needs beside the shared buffers; grows with the largest linear it has met.
struct Room {
    std::vector<uint8_t> panels;
    std::vector<uint8_t> rows;
    std::vector<float> scales;

    // So many bytes for panels, at a multiple of 64.
    uint8_t* widened(size_t bytes) {
        if (panels.size() < bytes + 64) panels.resize(bytes + 64);
        return (uint8_t*)(((uintptr_t)panels.data() + 63) & ~(uintptr_t)63);
    }

    static Room& mine() {
        static thread_local Room room;
        return room;
    }
};

// As `Linear`, whose chunks it shares: x [M, K] bf16 times a quantised weight [K, N].
struct QuantLinear {
    Linear plain;
    Weight w;

    static constexpr int64_t KEPT_ROWS = 96;  // up to here a thread keeps all rows as bytes, else those of its chunk
    int64_t base(int64_t first) const { return plain.m <= KEPT_ROWS ? 0 : first; }

    // The rows that a chunk meets, as bytes.
    void quantize(int64_t first, int64_t last, Room& room) const {
        const int64_t from = base(first), count = plain.m <= KEPT_ROWS ? plain.m : last - first;
        if ((int64_t)room.rows.size() < count * plain.k) room.rows.resize(count * plain.k);
        if ((int64_t)room.scales.size() < count) room.scales.resize(count);
        for (int64_t r = first; r < last; ++r)
            room.scales[r - from] = quantize_row(plain.x + r * plain.k, plain.k, room.rows.data() + (r - from) * plain.k);
    }

    template <int R>
    void integers(int c, const Room& room, int64_t first, int64_t panel, int64_t row) const {
        const uint8_t* x = room.rows.data() + (row - base(first)) * plain.k;
        const float* s = room.scales.data() + (row - base(first));
        switch (c) {
            case 4: return integer<R, 4>(x, s, w, panel, plain.k, plain.n, plain.to, row);
            case 3: return integer<R, 3>(x, s, w, panel, plain.k, plain.n, plain.to, row);
            case 2: return integer<R, 2>(x, s, w, panel, plain.k, plain.n, plain.to, row);
            default: return integer<R, 1>(x, s, w, panel, plain.k, plain.n, plain.to, row);
        }
    }

    // R rows times c panels; three are two and one, as a gate and its other half must stay together.
    template <int64_t FORMAT, int R, bool KEEP = false>
    void rows(int c, const uint8_t* codes, int64_t panel, int64_t row, uint8_t* wide = nullptr) const {
        const bf16* x = plain.x + row * plain.k;
        const auto some = [&](auto tile, int64_t skip) {
            tile(x, codes + skip * plain.k / 2 * pair_bytes<FORMAT>(), w, panel + skip, plain.k, plain.n, plain.to, row,
                 wide + skip * plain.k * 32);
        };
        if (c == 4) return some(narrow_tile<FORMAT, R, 4, KEEP>, 0);
        if (c >= 2) some(narrow_tile<FORMAT, R, 2, KEEP>, 0);
        if (c % 2) some(narrow_tile<FORMAT, R, 1, KEEP>, c - 1);
    }

    // The first four or six rows widen the codes on their way and leave them to the others.
    template <int64_t FORMAT>
    void weight_only(int c, int64_t panel, int64_t first, int64_t last, Room& room) const {
        const uint8_t* codes = w.codes + panel * panel_bytes(FORMAT, plain.k);
        switch (last - first) {
            case 1: return rows<FORMAT, 1>(c, codes, panel, first);
            case 2: return rows<FORMAT, 2>(c, codes, panel, first);
            case 3: return rows<FORMAT, 3>(c, codes, panel, first);
            default: break;
        }
        uint8_t* wide = room.widened(c * plain.k * 32);
        const bool six = last - first >= 6;
        if (six) rows<FORMAT, 6, true>(c, codes, panel, first, wide);
        else rows<FORMAT, 4, true>(c, codes, panel, first, wide);
        int64_t row = first + (six ? 6 : 4);
        for (; row + 6 <= last; row += 6) rows<BF16, 6>(c, wide, panel, row);
        switch (last - row) {
            case 5: return rows<BF16, 5>(c, wide, panel, row);
            case 4: return rows<BF16, 4>(c, wide, panel, row);
            case 3: return rows<BF16, 3>(c, wide, panel, row);
            case 2: return rows<BF16, 2>(c, wide, panel, row);
            case 1: return rows<BF16, 1>(c, wide, panel, row);
            default: return;
        }
    }

    void dynamic(int c, int64_t panel, int64_t first, int64_t last, const Room& room) const {
        int64_t row = first;
        for (; row + 6 <= last; row += 6) integers<6>(c, room, first, panel, row);
        switch (last - row) {
            case 5: return integers<5>(c, room, first, panel, row);
            case 4: return integers<4>(c, room, first, panel, row);
            case 3: return integers<3>(c, room, first, panel, row);
            case 2: return integers<2>(c, room, first, panel, row);
            case 1: return integers<1>(c, room, first, panel, row);
            default: return;
        }
    }

    // Codes that are widened meet as many rows as can stay at hand, so that it is paid for once.
    bool widens() const { return w.format != INT8_DYNAMIC; }
    int64_t rows_a_chunk() const { return widens() ? std::min(plain.m, KEPT_ROWS) : plain.rows_a_chunk(); }
    int64_t row_blocks() const { return (plain.m + rows_a_chunk() - 1) / rows_a_chunk(); }
    int64_t groups_a_chunk() const { return widens() ? 1 : plain.groups_a_chunk(); }
    int64_t chunks() const {
        return plain.m == 0 ? 0 : (plain.groups() + groups_a_chunk() - 1) / groups_a_chunk() * row_blocks();
    }

    // `ready` tells which row blocks this thread has as bytes already.
    void chunk(int64_t i, Room& room, uint64_t& ready) const {
        const int64_t blocks = row_blocks(), block = i / blocks, first = i % blocks * rows_a_chunk();
        const int64_t last = std::min(plain.m, first + rows_a_chunk());
        const int64_t end = std::min(plain.groups(), (block + 1) * groups_a_chunk());
        const uint64_t mine = plain.m <= KEPT_ROWS ? 1ull << (i % blocks) : 0;
        if (w.format == INT8_DYNAMIC && !(ready & mine)) quantize(first, last, room);
        ready |= mine;
        for (int64_t group = block * groups_a_chunk(); group < end; ++group) {
            const int c = (int)std::min<int64_t>(4, plain.panels() - group * 4);
            switch (w.format) {
                case INT8_DYNAMIC: dynamic(c, group * 4, first, last, room); break;
                case INT8: weight_only<INT8>(c, group * 4, first, last, room); break;
                case INT4: weight_only<INT4>(c, group * 4, first, last, room); break;
                case FP8: weight_only<FP8>(c, group * 4, first, last, room); break;
                default: weight_only<NF4>(c, group * 4, first, last, room); break;
            }
        }
    }
};

// A linear of any format as one phase; `before` runs once in each thread that takes a chunk.
template <class Before>
void product(Team::Walk& team, const Linear& plain, const void* weight, const Before& before) {
    Weight w;
    std::memcpy(&w, weight, sizeof w);
    uint64_t ready = 0;
    bool prepared = false;
    Linear wide = plain;
    wide.w = (const bf16*)w.codes;
    const QuantLinear narrow{plain, w};
    team.phase(w.format == BF16 ? plain.chunks() : narrow.chunks(), [&](int64_t i) {
        if (!prepared) before();
        prepared = true;
        if (w.format == BF16) wide.chunk(i); else narrow.chunk(i, Room::mine(), ready);
    });
}

// The step of kernels.cpp with pointers to `Weight` where packed weights stood.
struct QuantJob : Job {
    void normed(Team::Walk& team, int64_t rows, const int32_t* which, const float* weight, const void* w, int64_t n,
                const Target& to) const {
        const bool own = few(rows) && few(step.tokens);
        bf16* mine = Job::normed + (own ? team.slot() * step.tokens * m.hidden : 0);
        const auto norm = [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; ++i)
                rms_norm(residual + (which ? which[i] : i) * m.hidden, m.hidden, weight, m.eps, mine + i * m.hidden);
        };
        if (!own)
            team.phase((rows + ROWS - 1) / ROWS,
                       [&](int64_t chunk) { norm(chunk * ROWS, std::min(rows, (chunk + 1) * ROWS)); });
        product(team, Linear{mine, rows, m.hidden, nullptr, n, to}, w, [&] { if (own) norm(0, rows); });
    }

    void operator()(Team::Walk& team) const {
        const int64_t t = step.tokens, hidden = m.hidden, width = m.heads * m.head_dim;
        const auto nothing = [] {};
        team.phase((t + ROWS - 1) / ROWS, [&](int64_t chunk) { embed(chunk); });
        for (int64_t l = 0; l < m.layers; ++l) {
            const FbLayer& layer = m.layer[l];
            normed(team, t, nullptr, layer.norm_in, layer.qkv, qkv_width(), Target{STORE, qkv, qkv_width(), layer.qkv_bias});
            attention(team, layer);
            product(team, Linear{seen, t, width, nullptr, hidden, Target{ADD_FLOAT, residual, hidden, layer.o_bias}}, layer.o,
                    nothing);
            normed(team, t, nullptr, layer.norm_post, layer.gate_up, 2 * m.intermediate,
                   Target{GATED, inner, m.intermediate, nullptr});
            product(team, Linear{inner, t, m.intermediate, nullptr, hidden, Target{ADD_FLOAT, residual, hidden, nullptr}},
                    layer.down, nothing);
        }
        normed(team, step.samples, step.sampled, m.norm, m.head, m.vocab, Target{STORE_FLOAT, step.logits, m.vocab, nullptr});
    }
};

}  // namespace

extern "C" {

int64_t fq_code_bytes(int64_t format, int64_t n, int64_t k) { return (n + 15) / 16 * panel_bytes(format, k); }

// codes [N, K], a byte a weight; scales [N, G]; gated as in fb_pack. Columns that pad the last panel have scale 0.
void fq_pack(int64_t format, const uint8_t* codes, const float* scales, int64_t n, int64_t k, int64_t groups, int gated,
             uint8_t* out, float* out_scales, int32_t* out_sums) {
    const int64_t panels = (n + 15) / 16;
    for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t first = gated ? (panel / 2) * 16 + (panel % 2) * (n / 2) : panel * 16;
        uint8_t* to = out + panel * panel_bytes(format, k);
        for (int64_t c = 0; c < 16; ++c) {
            const bool real = gated || panel * 16 + c < n;
            const uint8_t* row = codes + (first + c) * k;
            for (int64_t g = 0; g < groups; ++g)
                out_scales[(panel * groups + g) * 16 + c] = real ? scales[(first + c) * groups + g] : 0.0f;
            int32_t sum = 0;
            for (int64_t i = 0; i < k; ++i) {
                const uint8_t code = real ? row[i] : 0;
                sum += (int8_t)code;
                if (format == INT8_DYNAMIC) to[i / 4 * 64 + c * 4 + i % 4] = code;
                else if (format == INT8 || format == FP8) to[i / 2 * 32 + c * 2 + i % 2] = code;
                else if (i % 2) to[i / 2 * 16 + c] |= (uint8_t)(code << 4);
                else to[i / 2 * 16 + c] = code;
            }
            if (out_sums) out_sums[panel * 16 + c] = sum;
        }
    }
}

// y [M, N] float = x [M, K] bf16 times a weight; for tests and for measuring one linear alone.
void fq_linear(const bf16* x, int64_t m, int64_t k, const void* weight, int64_t n, float* y, int64_t threads) {
    const Linear plain{x, m, k, nullptr, n, Target{STORE_FLOAT, y, n, nullptr}};
    Weight w;
    std::memcpy(&w, weight, sizeof w);
    Team::instance().run((int)threads, [=](Team::Walk& team) { product(team, plain, &w, [] {}); });
}

void fq_forward(const FbModel* m, const FbStep* step) {
    QuantJob job{};
    job.m = *m;
    job.step = *step;
    job.alone = true;
    for (int64_t row = 1; row < step->tokens; ++row) job.alone &= step->sequence[row] != step->sequence[row - 1];
    job.place((char*)(((uintptr_t)step->scratch + 63) & ~(uintptr_t)63));
    Team::instance().run((int)step->threads, job);
}

}  // extern "C"
