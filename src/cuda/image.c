/* .incbin puts the bytes into .rodata as they are: no generated source, no copy at load time, and the assembler needs
 * no time for it. The build passes QL_FATBINS, the name of a header that it writes, with a list
 * QL_FATBIN_LIST(X): X(name, "path", "architectures") for each file, and QL_FATBIN_ARCHITECTURES and QL_FATBIN_CUDA_MAJOR. */
#include "image.h"

#ifdef QL_FATBINS

#include QL_FATBINS

#define QL_EMBED(name, path, architectures)                                                                            \
    __asm__(".pushsection .rodata\n"                                                                                   \
            ".balign 64\n"                                                                                             \
            ".hidden ql_fatbin_" #name "\n"                                                                            \
            ".globl ql_fatbin_" #name "\n"                                                                             \
            "ql_fatbin_" #name ":\n"                                                                                   \
            ".incbin \"" path "\"\n"                                                                                   \
            ".hidden ql_fatbin_end_" #name "\n"                                                                        \
            ".globl ql_fatbin_end_" #name "\n"                                                                         \
            "ql_fatbin_end_" #name ":\n"                                                                               \
            ".byte 0\n"                                                                                                \
            ".popsection\n");                                                                                          \
    extern const unsigned char ql_fatbin_##name[], ql_fatbin_end_##name[];
QL_FATBIN_LIST(QL_EMBED)
#undef QL_EMBED

#define QL_EXTENT(name, path, architectures) {#name, architectures, ql_fatbin_##name, ql_fatbin_end_##name},
static const struct {
    const char *name, *architectures;
    const unsigned char *begin, *end;
} images[] = {QL_FATBIN_LIST(QL_EXTENT)};
#undef QL_EXTENT

_Static_assert(sizeof images / sizeof *images <= QL_CUDA_MAX_IMAGES, "library.c has room for the images");

int ql_cuda_image_count(void) { return (int)(sizeof images / sizeof *images); }

ql_cuda_image ql_cuda_image_at(int index) {
    const unsigned char *begin = images[index].begin;
    return (ql_cuda_image){images[index].name, images[index].architectures, begin,
                           (int64_t)((uintptr_t)images[index].end - (uintptr_t)begin)};
}

const char *ql_cuda_image_architectures(void) { return QL_FATBIN_ARCHITECTURES; }

/* Binaries of CUDA 13 need a driver of CUDA 13; those of CUDA 12, compressed, one of CUDA 12.4. */
int ql_cuda_image_driver(void) { return QL_FATBIN_CUDA_MAJOR == 12 ? 12040 : 1000 * QL_FATBIN_CUDA_MAJOR; }

#else

int ql_cuda_image_count(void) { return 0; }

ql_cuda_image ql_cuda_image_at(int index) {
    (void)index;
    return (ql_cuda_image){0};
}

const char *ql_cuda_image_architectures(void) { return ""; }

int ql_cuda_image_driver(void) { return 0; }

#endif
