// The kernel API of moyu_ext on one page: raw pointers, sizes, and on CUDA a stream.
// No torch header, no Python. Callers check shapes and dtypes; kernels trust them.
//
// Terms (arXiv 2406.12569, eq. 11-14): hidden size d, intermediate size f, neuron i = row i of
// gate and up and row i of down_t (W_down kept neuron-major). Every matrix is contiguous, row-major.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moyu {

enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };
enum class Activation : int32_t { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3, kRelu2 = 4 };
// Where the threshold is applied: behind the gate projection, or behind gate and up.
enum class Plan : int32_t { kGate = 0, kProduct = 1 };

// Rows that one pass over the weights serves; more rows are served in blocks of this many.
inline constexpr int64_t kMaxRows = 8;

// Packed rows of d columns: codes of 3, 4, 5, 6 or 8 bits in blocks of 64 columns, then a scale and
// an offset (IEEE binary16) per group of 32 or 64 columns; a weight is scale * code + offset. A row
// is [blocks of codes][scales][offsets]; columns behind d are ignored. A block of b bits takes 8 b
// bytes, and element 16t + w of it (t < 4, w < 16) lies in
//   b = 4, 5, 6: bits 4t .. 4t+3 of little-endian word w of 32 bytes: its low four bits
//   b = 8:       byte t % 2 of word w of the 32 bytes from 32 (t / 2) on
//   b = 3:       bits 2t, 2t+1 of byte w of 16: its low two bits
//   b = 6:       behind them, bits 2t, 2t+1 of byte w of 16: its high two bits
//   b = 3, 5:    behind them, bit w of little-endian word t of 4: its top bit
inline constexpr int64_t kPackedBlock = 64;
constexpr int64_t packed_blocks(int64_t d) { return (d + kPackedBlock - 1) / kPackedBlock; }
constexpr int64_t packed_row_bytes(int64_t d, int32_t bits, int32_t group) {
  return packed_blocks(d) * (8 * bits + 4 * (kPackedBlock / group));
}

// A matrix as the kernels read it: T [n, d], or n packed rows where bits is not 0.
struct Matrix {
  const void* rows = nullptr;
  int32_t bits = 0, group = 0;
  Matrix(const void* rows = nullptr, int32_t bits = 0, int32_t group = 0)
      : rows(rows), bits(bits), group(group) {}
  explicit operator bool() const { return rows != nullptr; }
};

// One MLP and the rows that go through it. T is the element type named by dtype. Either all three
// matrices are packed or none.
struct Mlp {
  const void* x = nullptr;          // T [rows, d]
  Matrix gate;                      // [f, d], null for an ungated MLP
  Matrix up;                        // [f, d]; W_in of an ungated MLP
  Matrix down_t;                    // [f, d], neuron-major
  const void* gate_bias = nullptr;  // T [f] or null
  const void* up_bias = nullptr;    // T [f] or null
  const void* down_bias = nullptr;  // T [d] or null
  void* out = nullptr;              // T [rows, d], fully written
  int64_t rows = 0, d = 0, f = 0;
  DType dtype = DType::kFloat32;
  Activation activation = Activation::kSilu;
};

// The union of the rows' active sets, and which row uses which neuron.
struct ActiveSet {
  const int32_t* indices = nullptr;  // [f], ascending in [0, f); null: every neuron in order
  const int32_t* count = nullptr;    // [1], how many of indices are valid; null: f
  const uint8_t* mask = nullptr;     // [rows, f], 0 switches a neuron off for a row; null: all on
};

// Low-bit copies of gate and up that estimate every neuron's norm (qRIDA). x is quantised to int8
// in blocks of kShadowBlock; a weight is scale * (code - (2^bits - 1) / 2) with one bfloat16 scale
// per neuron, matrix and block. A record holds one neuron: gate blocks, up blocks, gate scales, up
// scales, zeros up to a multiple of 64 bytes. A block of b bits takes 32 b bytes:
//   b = 2, 3: byte p, bits 2t and 2t+1 (p < 64, t < 4): low two bits of the code of element 64t + p
//   b = 1, 3: behind them, byte p (p < 32): bit t is the top bit of element 64t + p, and bit t + 4
//             that of element 64t + 32 + p (t < 4)
//   b = 4:    line h < 2, byte p, nibble t < 2: code of element 128h + 64t + p
inline constexpr int64_t kShadowBlock = 256;
struct Shadow {
  const uint8_t* records = nullptr;   // [f, record_bytes]
  const float* norms = nullptr;       // [f] column norms of W_down
  const float* inverse = nullptr;     // [f]: estimated a_i over its score, where one is wanted
  const float* gate_error = nullptr;  // [f] root mean square errors of the estimates of gate . x
  const float* up_error = nullptr;    // and up . x, or null: see Tiers
  int32_t bits_gate = 0;              // 1..4, 0 for an ungated MLP
  int32_t bits_up = 0;                // 1..4
};

// The neurons of a row fall into tiers: exact ones, estimated ones, which add the shadow's own value
// of a_i times the exact row of down, and skipped ones. Which they are is told
//   by a price per row of weights read, where the shadow has errors: with the score n^ and the
//     squared error E = (D^2 (u^2 + up_error^2) + (act(g) up_error)^2) norms^2 expected of it, where
//     D = (act(g + gate_error) - act(g - gate_error)) / 2, an estimate saves n^2 for one row and an
//     exact value E more for two more (three: one more, without a gate): exact where E >= 2 price
//     and n^2 >= price, or n^2 < price and n^2 + E >= 3 price; else estimated where n^2 >= price
//     (ungated: E = (D norms)^2, with u in the place of g and up_error in that of gate_error);
//   by a threshold: exact where the score is not below epsilon;
//   by rank: the `exact` largest (of equals the lower index), then the `estimated` next.
struct Tiers {
  const float* epsilon = nullptr;  // [1], the price or the threshold; null: by rank
  int64_t exact = 0;
  int64_t estimated = 0;
};

constexpr int64_t shadow_blocks(int64_t d) { return (d + kShadowBlock - 1) / kShadowBlock; }
constexpr int64_t shadow_record_bytes(int64_t d, int32_t bits_gate, int32_t bits_up) {
  const int64_t codes = 32 * (bits_gate + bits_up), scales = bits_gate ? 4 : 2;
  return (shadow_blocks(d) * (codes + scales) + 63) / 64 * 64;
}

// x / sqrt(mean(x^2) + eps) * (weight + offset); without a weight x stays as it is.
struct RmsNorm {
  const void* weight = nullptr;  // T [n] or null
  float eps = 0.0f, offset = 0.0f;
  explicit operator bool() const { return weight != nullptr; }
};

struct Linear {
  Matrix weight;               // [n, d]
  const void* bias = nullptr;  // T [n] or null
};

// The attention of one decoder layer, with its norms and the residual around it:
//   hidden += residual_scale * after(o(attention(q_norm(q(x)), k_norm(k(x)), v(x)))), x = before(hidden)
struct Attention {
  RmsNorm before, q_norm, k_norm, after;
  bool wide_norms = false;  // q_norm and k_norm over all heads at once, not over each
  bool rotary = true;
  Linear q, k, v, o;  // [heads * head_dim, d], twice [kv_heads * head_dim, d], and
                      // [d, heads * head_dim]
  int64_t d = 0, heads = 0, kv_heads = 0, head_dim = 0;
  float scale = 1.0f;    // of q . k
  float softcap = 0.0f;  // c: scores become c tanh(score / c); 0: none
  float residual_scale = 1.0f;
  DType dtype = DType::kFloat32;
};

// The rows of a decode step, and where they stand: row r is token r % length of sequence
// r / length. Keys and values lie in places; the new ones go to past, past + 1, ...
struct StepRows {
  int64_t rows = 0, length = 1, past = 0;
  const int64_t* first = nullptr;  // [rows] the first place that a row sees; the last is its own
  const float* cos = nullptr;      // [length, rotated] of each sequence
  const float* sin = nullptr;
  int64_t rotated = 0;          // leading elements of a head that are rotated, in halves
  int64_t sequence_stride = 0;  // elements from a sequence's cos to the next one's
  // Where not null: nanoseconds spent in q, k and v with the norm before them, in the attention, and
  // in o with what follows, are added to it.
  int64_t* spent = nullptr;
};

// Keys and values of one layer, T [sequences, kv_heads, places, head_dim]: a head's are contiguous.
struct KeyValues {
  void* keys = nullptr;
  void* values = nullptr;
  int64_t sequence_stride = 0, head_stride = 0;  // in elements
};

namespace cpu {

// indices[r, 0:count[r]] = ascending i with !(values[r, i] < epsilon[0]); a NaN counts as active,
// so that it reaches the output. Entries past count[r] are 0.
void threshold_compact(const float* values, int64_t rows, int64_t f, const float* epsilon,
                       int32_t* indices /* [rows, f] */, int32_t* count /* [rows] */);

// out[r, k] = weight[indices[k]] . x[r] + bias[indices[k]] for k < count, 0 up to capacity.
// indices and count both null: every weight row in order, capacity = f.
void gather_gemv(const void* x /* T [rows, d] */, const Matrix& weight /* [f, d] */,
                 const void* bias /* T [f] or null */,
                 const int32_t* indices /* [capacity] or null */,
                 const int32_t* count /* [1] or null */, float* out /* [rows, capacity] */,
                 int64_t rows, int64_t d, int64_t capacity, DType dtype, float* workspace);

// out[r] = sum over k < count of values[r, k] * weight_t[indices[k]] + bias.
// indices and count both null: every weight row in order, capacity = f.
void gather_gemv_t(const float* values /* [rows, capacity] */, const Matrix& weight_t /* [f, d] */,
                   const void* bias /* T [d] or null */,
                   const int32_t* indices /* [capacity] or null */,
                   const int32_t* count /* [1] or null */, void* out /* T [rows, d] */,
                   int64_t rows, int64_t d, int64_t capacity, DType dtype, float* workspace);

// out[i, j] = the value of packed row i at column j < d.
void unpack_rows(const Matrix& packed /* [n, d] */, int64_t n, int64_t d, DType dtype,
                 void* out /* T [n, d] */);

// The MLP over a set known in advance: a_i = act(gate_i . x) * (up_i . x), out = sum a_i down_i.
void sparse_mlp(const Mlp& mlp, const ActiveSet& set, float* workspace);

// The MLP whose set follows from a threshold on the way, per row: neuron i is active where
//   Plan::kGate     abs(act(gate_i . x))               * scale[i] >= epsilon[0]
//   Plan::kProduct  abs(act(gate_i . x) * (up_i . x))  * scale[i] >= epsilon[0]
// (up_i in the place of gate_i where the MLP is ungated). counts[r] = active neurons of row r.
void threshold_mlp(const Mlp& mlp, Plan plan, const float* scale /* [f] or null: 1 */,
                   const float* epsilon /* [1] */, int32_t* counts /* [rows] */, float* workspace);

// scores[r, i] = abs(act(g) * u) * norms[i] with g and u estimated from the shadow, or
// abs(act(u)) * norms[i] without a gate. Of mlp it reads x, gate_bias, up_bias and the sizes.
void shadow_scores(const Mlp& mlp, const Shadow& shadow, float* scores /* [rows, f] */,
                   float* workspace);

// The MLP in the tiers that the shadow names, per row; counts[0, r] and counts[1, r]: exact and
// estimated neurons of row r.
void shadow_mlp(const Mlp& mlp, const Shadow& shadow, const Tiers& tiers,
                int32_t* counts /* [2, rows] */, float* workspace);

// One layer's attention for up to kMaxRows rows, see Attention; hidden is float32 [rows, d].
void attend(const Attention& attention, const StepRows& step, const KeyValues& cache, float* hidden,
            float* workspace);

// out = norm(hidden), T [rows, d].
void norm_rows(const float* hidden, const RmsNorm& norm, int64_t rows, int64_t d, DType dtype,
               void* out);

// hidden += scale * norm(y), y T [rows, d].
void add_rows(const void* y, const RmsNorm& norm, float scale, int64_t rows, int64_t d, DType dtype,
              float* hidden);

// Floats of scratch that attend needs at the current thread count.
size_t attend_workspace_floats(const Attention& attention, int64_t rows);

// Floats of scratch that the two shadow calls need at the current thread count.
size_t shadow_workspace_floats(int64_t rows, int64_t d, int64_t f);

// Floats of scratch that the others which take some need at the current thread count.
size_t workspace_floats(int64_t rows, int64_t d);

// Moves the whole 2 MB pages within [begin, begin + bytes) to huge pages where the system has them;
// the contents stay. False where it does not, or where nothing that large lies within.
bool use_huge_pages(const void* begin, size_t bytes);

// Instruction sets: "scalar", "avx2", "avx512", "avx512_vnni" and "avx512_bf16" (both with GFNI),
// "neon".
const char* isa_name();                     // the one in use
int isa_list(const char** names, int max);  // those that this build has and this CPU runs
void set_isa(const char* name);             // throws std::invalid_argument where it can't

}  // namespace cpu
}  // namespace moyu
