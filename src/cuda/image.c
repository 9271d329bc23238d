/* .incbin puts the bytes into .rodata as they are: no generated source, no copy at load time, and the assembler needs
 * no time for it. The path comes from the build as the string QL_FATBIN. */
#include "image.h"

#ifdef QL_FATBIN

__asm__(".pushsection .rodata\n"
        ".balign 64\n"
        ".hidden ql_fatbin_begin\n"
        ".globl ql_fatbin_begin\n"
        "ql_fatbin_begin:\n"
        ".incbin \"" QL_FATBIN "\"\n"
        ".hidden ql_fatbin_end\n"
        ".globl ql_fatbin_end\n"
        "ql_fatbin_end:\n"
        ".byte 0\n"
        ".popsection\n");

extern const unsigned char ql_fatbin_begin[];
extern const unsigned char ql_fatbin_end[];

const void *ql_cuda_image(void) { return ql_fatbin_begin; }

int64_t ql_cuda_image_bytes(void) { return (int64_t)((uintptr_t)ql_fatbin_end - (uintptr_t)ql_fatbin_begin); }

const char *ql_cuda_image_architectures(void) { return QL_FATBIN_ARCHITECTURES; }

/* Binaries of CUDA 13 need a driver of CUDA 13; those of CUDA 12, compressed, one of CUDA 12.4. */
int ql_cuda_image_driver(void) { return QL_FATBIN_CUDA_MAJOR == 12 ? 12040 : 1000 * QL_FATBIN_CUDA_MAJOR; }

#else

const void *ql_cuda_image(void) { return 0; }

int64_t ql_cuda_image_bytes(void) { return 0; }

const char *ql_cuda_image_architectures(void) { return ""; }

int ql_cuda_image_driver(void) { return 0; }

#endif
