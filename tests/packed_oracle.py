"""The layout of kernels/packed.h, written from its tables: where each code, scale and zero of a packed weight lies."""

import numpy as np

BITS = {0: 2, 1: 3, 2: 4, 3: 8, 4: 4}
TILE_COLUMNS = {0: 128, 1: 128, 2: 64, 3: 32, 4: 64}
NAMES = (
    "version",
    "source",
    "code",
    "n",
    "k",
    "group_size",
    "groups",
    "scales_dtype",
    "has_zeros",
    "zero_offset",
    "has_order",
    "nested_blocksize",
    "nested_offset",
)
SCALE_SIZE = {0: 4, 1: 2, 2: 2}
GPTQ, AWQ, EETQ, FOURBIT = 0, 1, 2, 4


def named(spec):
    return dict(zip(NAMES, spec, strict=True))


def tiles(code, n, k, codes):
    """The bytes of the section of codes, from codes [n, k]."""
    columns = TILE_COLUMNS[code]
    strips, across = -(-n // 16), -(-k // columns)
    bytes_ = 768 if code == 1 else 512
    words = np.zeros((strips, across, bytes_ // 4), np.uint32)
    row, col = np.meshgrid(np.arange(n), np.arange(k), indexing="ij")
    g, h = row % 16 % 8, row % 16 // 8
    s, inside = col % columns // 16, col % 16
    p, t, e = inside // 8, inside % 8 // 2, inside % 2
    lane = 4 * g + t
    word, bit = {
        0: (s // 2, 16 * e + 8 * p + 4 * (s % 2) + 2 * h),
        1: (s // 2, 16 * e + 8 * p + 4 * (s % 2) + 2 * h),
        2: (s, 16 * e + 8 * p + 4 * h),
        3: (2 * s + p, 16 * e + 8 * h),
        4: (s, 16 * p + 8 * h + 4 * e),
    }[code]
    codes = codes.astype(np.uint32)
    low = codes & 3 if code == 1 else codes
    at = (row // 16, col // columns)
    np.bitwise_or.at(words, (*at, 4 * lane + word), low << bit.astype(np.uint32))
    if code == 1:
        high_bit = (16 * e + 8 * p + 4 * (s % 2) + 2 * (s // 2 % 2) + h).astype(np.uint32)
        np.bitwise_or.at(words, (*at, 128 + 2 * lane + s // 4), (codes >> 2) << high_bit)
    return words.reshape(-1).view(np.uint8)


def places(n, groups):
    """(the number of places, the place of each [n, groups])."""
    row, group = np.meshgrid(np.arange(n), np.arange(groups), indexing="ij")
    if groups == 1:
        return -(-n // 16) * 16, row
    pairs = -(-groups // 2)
    # Four entries in one load: two groups, of each the rows g and g + 8.
    at = ((row // 16 * pairs + group // 2) * 8 + row % 8) * 4 + group % 2 * 2 + row // 8 % 2
    return -(-n // 16) * pairs * 32, at


def entries(n, groups, values):
    count, at = places(n, groups)
    out = np.zeros(count, values.dtype)
    out[at] = values
    return out


def nibbles(values):
    return (values[::2] | values[1::2] << 4).astype(np.uint8)


def order(g_idx):
    """The columns by their groups. In a group, place p takes the next column of class p % 8, a column's being that of
    its piece of 8; those that find no place of their class take the places that are left."""
    found = []
    for group in range(g_idx.max() + 1):
        columns = np.flatnonzero(g_idx == group)
        places = np.full(len(columns), -1)
        others = np.zeros(len(columns), bool)
        for which in range(8):
            own = np.flatnonzero(columns // 8 % 8 == which)
            room = len(places[which::8])
            places[which::8][: len(own)] = columns[own[:room]]
            others[own[room:]] = True
        places[places < 0] = columns[others]
        found.append(places)
    return np.concatenate(found)


def sections(spec, packed):
    """The bytes of each section, by name: what lies between them is nobody's."""
    spec = named(spec)
    code, n, k, groups, source = (spec[name] for name in ("code", "n", "k", "groups", "source"))
    nested, bits = spec["nested_blocksize"], BITS[code]
    count, _ = places(n, groups)
    tail = source == AWQ and n % 8 != 0
    sizes = {
        "codes": -(-n // 16) * -(-k // TILE_COLUMNS[code]) * (768 if code == 1 else 512),
        "scales": count * (1 if nested else SCALE_SIZE[spec["scales_dtype"]]),
        "zeros": 0 if not spec["has_zeros"] else count if code == 3 else count // 2,
        "table": 64 if source == FOURBIT else 0,
        "nested_table": 1024 if nested else 0,
        "nested_absmax": 4 * -(-n * groups // nested) if nested else 0,
        "order": 4 * k * spec["has_order"],
        "inverse": 4 * k * spec["has_order"],
        "word_tail": 4 * k if tail else 4 * n if source == GPTQ and k * bits % 32 else 0,
        "zero_tail": 4 * groups if spec["has_zeros"] and n * bits % 32 else 0,
    }
    found, at = {}, 0
    for name, size in sizes.items():
        found[name] = packed[at : at + size]
        at += -(-size // 256) * 256
    assert at == len(packed)
    return found
