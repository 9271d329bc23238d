/* How a weight lies in GPU memory once it is packed for the W?A16 kernels: plain C for the host and the device.
 *
 * Codes. The weight [n, k] is cut into strips of 16 rows, a strip into tiles of QL_TILE_K(code) columns; tiles of a strip
 * follow each other along k, strips follow each other. A tile is what the 32 lanes of a warp feed to mma.m16n8k16 or, four
 * strips together, to wgmma with A from registers: lane = 4 * g + t holds rows g and g + 8 of the strip, and of each step
 * of 16 columns the columns 2t, 2t + 1, 2t + 8, 2t + 9. Its codes are the 16 bytes at tile + 16 * lane (3 bit: those have
 * the low two bits, and 8 bytes at tile + 512 + 8 * lane the high ones). Within them, for step s of the tile, row
 * g + 8 * h, column 2t + 8 * p + e of the step:
 *
 *   code      columns a tile   word                 bit
 *   2 bit     128              s / 2                16 e + 8 p + 4 (s % 2) + 2 h
 *   3 bit     128              low: as 2 bit        high: word s / 4 of two, bit 16 e + 8 p + 4 (s % 2) + 2 (s / 2 % 2) + h
 *   4 bit     64               s                    16 e + 8 p + 4 h
 *   table     64               s                    16 p + 8 h + 4 e      (a byte is a pair of neighbouring columns)
 *   8 bit     32               2 s + p              16 e + 8 h
 *   e4m3      32               2 s + p              16 e + 8 h
 *
 * so that one mask gives a register of two codes, and all codes of row g meet one mask shift, all of row g + 8 another.
 * Rows beyond n and columns beyond k are stored as code 0 and never count: x is 0 there and outputs beyond n are not
 * written.
 *
 * Groups. A group is group_size consecutive columns (a multiple of 16), or all of k where groups == 1. Entry (row, group)
 * of scales and zeros has the place QL_GROUP_PLACE: where groups > 1, a lane's two rows of two neighbouring groups are
 * side by side, four entries in one load. Scales are elements of scales_type. Zeros are nibbles for 2, 3 and 4 bit (the
 * low one first), bytes for 8 bit; without zeros every zero is 2^(bits - 1). With a table the scales are absmax, in fp32,
 * or one byte each where they are nested.
 *
 *   W[row][col] = (q - zero) * scale, or table[q] * absmax, or e4m3(q) * scale
 *   absmax = nested_table[byte] * nested_absmax[(row * (k / group_size) + group) / nested_blocksize] + nested_offset */
#ifndef QL_KERNELS_PACKED_H
#define QL_KERNELS_PACKED_H

#include <stdint.h>

enum { QL_CODE_INT2, QL_CODE_INT3, QL_CODE_INT4, QL_CODE_INT8, QL_CODE_TABLE4, QL_CODE_E4M3, QL_CODE_COUNT };

enum { QL_STRIP = 16, QL_STEP = 16 };

/* Columns and bytes of a tile. */
#define QL_TILE_K(code)                                                                                                \
    ((code) == QL_CODE_INT2 || (code) == QL_CODE_INT3     ? 128                                                        \
     : (code) == QL_CODE_INT4 || (code) == QL_CODE_TABLE4 ? 64                                                         \
                                                          : 32)
#define QL_TILE_BYTES(code) ((code) == QL_CODE_INT3 ? 768 : 512)

/* The table above as formulas: the lane of a code, the word of its 16 bytes, the bit in there; of 3 bit also the word and
 * the bit of its high part. */
#define QL_PACKED_LANE(row, col) ((int)((row) % 8 * 4 + (col) % 8 / 2))
#define QL_PACKED_WORD(code, col) ((int)((col) % QL_TILE_K(code) / (QL_TILE_K(code) / 4)))
#define QL_PACKED_BIT(code, row, col)                                                                                  \
    ((int)((code) == QL_CODE_INT2 || (code) == QL_CODE_INT3                                                            \
               ? (col) % 2 * 16 + (col) / 8 % 2 * 8 + (col) / 16 % 2 * 4 + (row) / 8 % 2 * 2                           \
           : (code) == QL_CODE_INT4   ? (col) % 2 * 16 + (col) / 8 % 2 * 8 + (row) / 8 % 2 * 4                         \
           : (code) == QL_CODE_TABLE4 ? (col) / 8 % 2 * 16 + (row) / 8 % 2 * 8 + (col) % 2 * 4                         \
                                      : (col) % 2 * 16 + (row) / 8 % 2 * 8))
#define QL_PACKED_HIGH_WORD(col) ((int)((col) % 128 / 64))
#define QL_PACKED_HIGH_BIT(row, col)                                                                                   \
    ((int)((col) % 2 * 16 + (col) / 8 % 2 * 8 + (col) / 16 % 2 * 4 + (col) / 32 % 2 * 2 + (row) / 8 % 2))

/* Columns in another order: those of a group go, as they come, to those of its places whose number is that of their piece of 8
 * columns, mod 8; where a class has no place left, as they come to the places that are left. So neighbouring pieces of x are stored
 * to different banks of shared memory (order.cuh). */
enum { QL_ORDER_CLASSES = 8 };
#define QL_ORDER_CLASS(col) ((int)((col) / 8 % QL_ORDER_CLASSES))

/* Bits of a code; 3 bit keeps two of them in its first 512 bytes. */
#define QL_CODE_BITS(code)                                                                                             \
    ((code) == QL_CODE_INT2                               ? 2                                                          \
     : (code) == QL_CODE_INT3                             ? 3                                                          \
     : (code) == QL_CODE_INT4 || (code) == QL_CODE_TABLE4 ? 4                                                          \
                                                          : 8)

/* The place of entry (row, group) among scales or zeros, where a strip's groups are rounded up to pairs. */
#define QL_GROUP_PLACE(row, group, groups)                                                                             \
    ((groups) == 1 ? (int64_t)(row)                                                                                    \
                   : (((int64_t)(row) / 16 * (((groups) + 1) / 2) + (group) / 2) * 8 + (row) % 8) * 4 +                \
                         (group) % 2 * 2 + (row) / 8 % 2)

/* The number of places: rows are rounded up to whole strips. */
#define QL_GROUP_PLACES(n, groups)                                                                                     \
    (((int64_t)(n) + 15) / 16 * ((groups) == 1 ? 16 : (int64_t)(((groups) + 1) / 2) * 32))

/* A packed weight with x, bias and output: what every kernel of the W?A16 engine takes. x_type of out and x is the
 * kernel's own; types are QL_VALUE_*. */
typedef struct ql_packed_params {
    void *out;                 /* [m, n] contiguous */
    const void *x;             /* [m, k], rows x_stride apart */
    const void *bias;          /* [n], bias_stride apart, bias_type, or NULL */
    const uint8_t *codes;      /* 16-byte aligned, as every section */
    const void *scales;        /* by QL_GROUP_PLACE, scales_type; bytes where nested_table is given */
    const uint8_t *zeros;      /* by QL_GROUP_PLACE, or NULL */
    const float *table;        /* [16], for QL_CODE_TABLE4 */
    const float *nested_table; /* [256], or NULL */
    const float *nested_absmax;
    const int32_t *order;   /* [k]: column j of the packed weight meets column order[j] of x; or NULL: as they are */
    const int32_t *inverse; /* [k]: inverse[order[j]] = j, or NULL likewise; 16-byte aligned */
    int64_t m, n, k, x_stride, bias_stride;
    int64_t group_size, groups, nested_blocksize;
    float nested_offset;
    int32_t code, scales_type, bias_type, x_type, out_type;
} ql_packed_params;

#endif
