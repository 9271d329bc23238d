/* A weight packed for the W?A16 kernels: one block of bytes whose sections are laid out as kernels/packed.h tells, and a
 * description of it (ql_packed_spec). Packing is a bijection: what a checkpoint held comes back bit for bit, also the bits
 * of words that no code fills. Here in plain C, one element at a time; cuda/pack.h does the same on a GPU. */
#ifndef QL_FORMATS_PACKED_H
#define QL_FORMATS_PACKED_H

#include "weight.h"

/* Room for the sentence that says why a weight is not packed. */
enum { QL_PACKED_REASON = 160 };

/* The sections, in their order in the block; each begins at a multiple of QL_SECTION_ALIGNMENT. Absent ones have 0 bytes. */
typedef enum ql_section {
    QL_SECTION_CODES,
    QL_SECTION_SCALES,
    QL_SECTION_ZEROS,
    QL_SECTION_TABLE,
    QL_SECTION_NESTED_TABLE,
    QL_SECTION_NESTED_ABSMAX,
    QL_SECTION_ORDER,
    QL_SECTION_INVERSE,
    QL_SECTION_WORD_TAIL, /* GPTQ: the last row of qweight, AWQ: its last column, where codes end inside a word */
    QL_SECTION_ZERO_TAIL, /* the last column of qzeros, likewise */
    QL_SECTION_COUNT
} ql_section;

enum { QL_SECTION_ALIGNMENT = 256 };

typedef struct ql_packed_layout {
    int64_t offset[QL_SECTION_COUNT], size[QL_SECTION_COUNT]; /* bytes */
    int64_t bytes;                                            /* of the whole block */
} ql_packed_layout;

/* The tensors that a packed weight came from, to be written: those that the checkpoint's kernels would read. */
typedef struct ql_unpacked {
    void *words;         /* qweight, EETQ's weight, FOURBIT's nibbles */
    int32_t *zeros;      /* qzeros */
    void *scales;        /* scales, or absmax: fp32, or bytes where nested */
    float *table;        /* FOURBIT [16] */
    float *nested_table; /* [256] */
    float *nested_absmax;
} ql_unpacked;

/* The description of `weight` packed; 0, or -1 with a sentence in reason where the layout does not hold it. g_idx: of GPTQ,
 * as the host can read it, [k] in [0, groups), or NULL. Other pointers of weight are not followed. */
int ql_packed_describe(ql_packed_spec *spec, const ql_weight *weight, const int32_t *g_idx,
                       char reason[QL_PACKED_REASON]);

/* Where the sections lie; 0, or -1 with a sentence in reason where the description is none that ql_packed_describe makes,
 * or its sizes do not fit int64. */
int ql_packed_lay_out(ql_packed_layout *layout, const ql_packed_spec *spec, char reason[QL_PACKED_REASON]);

/* Bits of a code. */
int ql_packed_bits(const ql_packed_spec *spec);

/* The weight that reads `data`, layout->bytes bytes at a multiple of 16. */
ql_weight ql_packed_weight(const ql_packed_spec *spec, const ql_packed_layout *layout, const uint8_t *data);

/* Elements of the tensors of ql_unpacked: of words (int32, or bytes of EETQ and FOURBIT), zeros, scales, nested_absmax. */
typedef struct ql_unpacked_sizes {
    int64_t words[2], zeros[2], scales[2]; /* rows, columns */
    int64_t nested_absmax;
} ql_unpacked_sizes;
ql_unpacked_sizes ql_packed_sizes(const ql_packed_spec *spec);

/* Fills all of data from the checkpoint's tensors that `weight` points to. */
void ql_packed_pack(uint8_t *data, const ql_packed_spec *spec, const ql_packed_layout *layout, const ql_weight *weight);

/* The inverse, from a weight of ql_packed_weight. */
void ql_packed_unpack(const ql_unpacked *out, const ql_weight *weight);

/* ql_weight_at of a packed weight. */
float ql_packed_at(const ql_weight *weight, int64_t row, int64_t col);

/* The description as numbers, version first, for those who keep it elsewhere; reading refuses what is out of range, with
 * a sentence. */
enum { QL_PACKED_VERSION = 1, QL_PACKED_NUMBERS = 13 };
void ql_packed_to_numbers(int64_t numbers[QL_PACKED_NUMBERS], const ql_packed_spec *spec);
int ql_packed_from_numbers(ql_packed_spec *spec, const int64_t numbers[QL_PACKED_NUMBERS],
                           char reason[QL_PACKED_REASON]);

#endif
