/* Packing on a GPU: what formats/packed.h does in plain C, from and to device memory. */
#ifndef QL_CUDA_PACK_H
#define QL_CUDA_PACK_H

#include "../formats/packed.h"
#include "launch.h"

/* As ql_packed_pack, every pointer device memory; waits until it is done, as kernels may read weights before they wait for
 * the work that was launched before them, and so may other streams. 0, or -1 with a sentence in message. */
int ql_cuda_pack(const ql_cuda_place *place, uint8_t *data, const ql_packed_spec *spec, const ql_packed_layout *layout,
                 const ql_weight *weight, char message[QL_CUDA_MESSAGE]);

/* As ql_packed_unpack; does not wait. */
int ql_cuda_unpack(const ql_cuda_place *place, const ql_unpacked *out, const ql_weight *weight,
                   char message[QL_CUDA_MESSAGE]);

#endif
