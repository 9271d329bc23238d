"""The C extension: six layer types and the quantizers and packers of their formats.

Every tensor argument may be any DLPack tensor (torch, NumPy, JAX, CuPy, ...); results come back in the framework of the
first tensor argument and on its device, where the work is done. N = out_features, K = in_features, G = groups. Errors:
TypeError for an argument of a wrong kind or dtype, ValueError for a wrong shape, device or value, NotImplementedError for
what no engine here can do; each names the argument, what came and what is taken.
"""

from typing import Any, Literal

Tensor = Any
Dtype = Literal["float32", "float16", "bfloat16"]

__version__: str

class Layer:
    """What the six types share. A layer holds references to the tensors it was made from, not copies, and sees it when
    their storage is replaced or changed in place."""

    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    @property
    def nbytes(self) -> int:
        """Bytes of all the tensors held."""
    def __call__(self, x: Tensor, /) -> Tensor:
        """x [..., K] in fp32, fp16 or bf16, any strides -> [..., N] in x's dtype and framework."""
    def grad_input(self, grad_output: Tensor, /) -> Tensor:
        """grad_output [..., N] -> [..., K], grad_output @ W, in grad_output's dtype."""
    def dequantize(self, dtype: Dtype = "float32") -> Tensor:
        """W [N, K] in dtype, in the framework of the first tensor held."""
    def pack(self) -> tuple[Tensor, tuple[int, ...]] | None:
        """(packed uint8 [bytes], spec) for PackedLinear, new memory on the same device; None where there is an obstacle.
        On a GPU it waits until the packing is done. Bytes between the sections of packed are nobody's."""
    @property
    def pack_obstacle(self) -> str:
        """Why pack() gives None; empty where it does not."""

class PackedLinear(Layer):
    """EETQLinear, QuantLinear, AWQLinear or Linear4bit in the layout of the GPU's kernels. A CPU reads it slowly."""

    def __init__(self, packed: Tensor, spec: tuple[int, ...], bias: Tensor | None = None) -> None:
        """packed and spec as pack() gave them."""
    def unpack(self) -> tuple[Tensor, ...]:
        """The checkpoint's tensors, bit for bit: (qweight, qzeros, scales) of GPTQ and AWQ, (weight, weight_scales) of
        EETQ, (weight, absmax, code[, nested_absmax, nested_code]) of Linear4bit."""
    @property
    def zero_format(self) -> Literal["gptq", "gptq_v2"]:
        """QuantLinear's; AttributeError where the layer was none."""
    @property
    def problem(self) -> tuple[str, int, int, int]:
        """(code, n, k, group_size): what a kernel is chosen for, beside the dtype and the rows of x."""

class EETQLinear(Layer):
    def __init__(self, weight: Tensor, weight_scales: Tensor, bias: Tensor | None = None) -> None:
        """weight int8 [K, N] in EETQ's interleaved layout (K % 64 == 0, N % 2 == 0), weight_scales float [N]."""

class QuantLinear(Layer):
    def __init__(
        self,
        qweight: Tensor,
        qzeros: Tensor,
        scales: Tensor,
        g_idx: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        bits: int,
        group_size: int,
        zero_format: Literal["auto", "gptq", "gptq_v2"] = "auto",
        in_features: int | None = None,
    ) -> None:
        """qweight int32 [ceil(K * bits / 32), N], qzeros int32 [G, ceil(N * bits / 32)], scales float [G, N],
        g_idx int32 [K] (negative entries count from G; all zero with G > 1 means trivial) or None; group_size -1: K.
        zero_format "auto": v2 where every zero is 2^(bits-1) as stored, else v1. in_features: K, where it is not
        g_idx's length or qweight.shape[0] * 32 // bits."""
    @property
    def zero_format(self) -> Literal["gptq", "gptq_v2"]: ...

class AWQLinear(Layer):
    def __init__(
        self,
        qweight: Tensor,
        qzeros: Tensor,
        scales: Tensor,
        bias: Tensor | None = None,
        *,
        group_size: int,
    ) -> None:
        """qweight int32 [K, N / 8], qzeros int32 [G, N / 8] or, of scales' dtype, the products -(scale * zero) [G, N];
        scales float [G, N]; group_size -1: K."""

class Linear8bitLt(Layer):
    def __init__(self, CB: Tensor, SCB: Tensor, bias: Tensor | None = None, *, threshold: float = 0.0) -> None:
        """CB int8 [N, K], SCB fp32 [N] (the rows' absmax)."""

class Linear4bit(Layer):
    def __init__(
        self,
        weight: Tensor,
        absmax: Tensor,
        code: Tensor,
        bias: Tensor | None = None,
        *,
        shape: tuple[int, int],
        blocksize: int,
        nested_absmax: Tensor | None = None,
        nested_code: Tensor | None = None,
        nested_offset: float = 0.0,
        nested_blocksize: int = 256,
    ) -> None:
        """weight uint8, (N * K + 1) // 2 bytes of any shape; absmax fp32 [blocks], or uint8 [blocks] with nested_absmax
        fp32 and nested_code fp32 [256]; code fp32 [16]; shape (N, K)."""

class Fp8Linear(Layer):
    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None = None,
        *,
        activation: Literal["none", "static", "tensor", "token", "group"] = "token",
        input_scale: Tensor | None = None,
        input_scale_ub: Tensor | float | None = None,
        block_size: tuple[int, int] = (128, 128),
        promoted: bool = False,
    ) -> None:
        """weight float8_e4m3fn (or its bytes, uint8) [N, K] of any strides; weight_scale fp32 (or bf16, fp16, e8m0)
        of one element, [N], [N, 1], [1, N], or [ceil(N / block_size[0]), ceil(K / block_size[1])]."""

# EETQ

def eetq_quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight float [N, K], any strides -> (weight int8 [K, N] interleaved, weight_scales [N] in weight's dtype).
    K % 64 == 0 and N % 2 == 0, else ValueError."""

def eetq_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """As eetq_quantize for any K and N, but codes int8 [K, N] row-major, not interleaved."""

def eetq_pack(codes: Tensor) -> Tensor:
    """codes int8 [K, N] -> the interleaved bytes, int8 [K, N]."""

def eetq_unpack(weight: Tensor) -> Tensor:
    """The inverse of eetq_pack."""

# GPTQ

def gptq_find_params(weight: Tensor, *, bits: int, group_size: int, sym: bool = False) -> tuple[Tensor, Tensor]:
    """weight float [N, K] -> (scales fp32 [N, G], zeros fp32 [N, G]) by GPTQ's min-max rule."""

def gptq_pack(
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    g_idx: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    zero_format: Literal["gptq", "gptq_v2"] = "gptq",
) -> tuple[Tensor, Tensor, Tensor]:
    """weight float [N, K], scales and zeros float [N, G] -> (qweight, qzeros, scales fp16 [G, N]).
    q = round((w + zero * scale) / fp16(scale)), clamped to [0, 2^bits - 1]."""

def gptq_pack_codes(codes: Tensor, *, bits: int) -> Tensor:
    """codes uint8 [K, N] -> int32 [ceil(K * bits / 32), N], a stream down each column."""

def gptq_unpack_codes(packed: Tensor, *, bits: int, count: int) -> Tensor:
    """The inverse: int32 [words, N] -> uint8 [count, N]."""

def gptq_unplanar(packed: Tensor, *, bits: int) -> Tensor:
    """qweight of the planar layout (gptq_p; 2, 3, 4 and 8 bits) -> the stream layout."""

# AWQ

def awq_quantize(weight: Tensor, *, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """weight float [N, K] -> (qweight [K, N / 8], qzeros [G, N / 8], scales fp16 [G, N]), asymmetric 4 bit by AWQ's rule."""

def awq_pack(codes: Tensor) -> Tensor:
    """codes uint8 [R, N] -> int32 [R, ceil(N / 8)] in AWQ's nibble order."""

def awq_unpack(packed: Tensor, *, count: int) -> Tensor:
    """The inverse: int32 [R, words] -> uint8 [R, count]."""

def awq_from_gemv(qweight: Tensor, qzeros: Tensor, scales: Tensor, *, group_size: int) -> tuple[Tensor, Tensor, Tensor]: ...
def awq_from_gemv_fast(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, *, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The zeros stay what they are: products -(scale * zero) [G, N]."""

def awq_from_marlin(qweight: Tensor, scales: Tensor, *, group_size: int) -> tuple[Tensor, Tensor, Tensor]: ...

# LLM.int8()

def int8_quantize(x: Tensor, *, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """x float [R, C] -> (codes int8 [R, C], absmax fp32 [R], outlier columns int64 [O], or None at threshold 0)."""

# bitsandbytes 4 bit and blockwise 8 bit

def fourbit_code(quant_type: Literal["nf4", "fp4"]) -> list[float]:
    """The 16 values of the code, in the order of their bit patterns."""

def dynamic_map(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> list[float]:
    """bitsandbytes' create_dynamic_map, 256 values in ascending order."""

def quantize_4bit(x: Tensor, *, quant_type: Literal["nf4", "fp4"], blocksize: int) -> tuple[Tensor, Tensor]:
    """x float, any shape -> (packed uint8 [(n + 1) // 2, 1], absmax fp32 [blocks])."""

def dequantize_4bit(packed: Tensor, absmax: Tensor, code: Tensor, *, count: int, blocksize: int, dtype: Dtype) -> Tensor:
    """-> [count]."""

def quantize_blockwise(x: Tensor, code: Tensor, *, blocksize: int) -> tuple[Tensor, Tensor]:
    """x float of any shape, code fp32 [256] ascending -> (uint8 of x's shape, absmax fp32 [blocks])."""

def dequantize_blockwise(x: Tensor, absmax: Tensor, code: Tensor, *, blocksize: int, dtype: Dtype) -> Tensor: ...
def absmax_mean(absmax: Tensor) -> Tensor:
    """The mean of a contiguous float32 tensor, [], summed in fp64 in one order: what double quantization takes off."""

# FP8

def fp8_quantize(
    x: Tensor,
    scale: Tensor | None = None,
    *,
    mode: Literal["static", "tensor", "token", "group", "block"],
    scale_ub: Tensor | float | None = None,
) -> tuple[Tensor, Tensor]:
    """x float [R, C] -> (q, scale fp32: [1], [R, 1], [R, ceil(C / 128)] or [ceil(R / 128), ceil(C / 128)]). q is
    float8_e4m3fn [R, C] where x's framework can hold it, else uint8."""

def fp8_matmul(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None = None, *, dtype: Dtype
) -> Tensor:
    """a e4m3 [M, K], b e4m3 [K, N] of any strides, scale_a one or M values, scale_b one or N -> [M, N] in dtype."""

# The call of a torch module

class Shortcut:
    """To stand as `__call__` in the class of a torch module that has its C layer as `_made = (layer, tensors)`: runs
    the product where nobody wants to see it, calls module.__call__ otherwise. As an attribute it is module.__call__."""

    def __init__(
        self,
        *,
        module: type,  # torch.nn.Module
        types: tuple[type, ...],  # of x, exactly one of them
        forwards: list[Any],  # what the module's class may have as forward
        empty: tuple[tuple[dict, str], ...],  # entries that are dicts, to be empty
        constant: tuple[tuple[dict, str, Any], ...],  # entries that are to have this value
        silent: tuple[Any, ...],  # callables that are to give None, False or 0
        is_grad_enabled: Any,
        is_autocast_enabled: Any,  # of "cpu", or of CUDA where it is called without a device
    ) -> None: ...
    def __call__(self, module: Any, *args: Any, **kwargs: Any) -> Any: ...

class AllReduce:
    """A GPU's end of sums over 2 to 8 GPUs of one host, a process each (qlinear.all_reduce): made in all processes, then
    connected with everybody's handles, then checked, each step when all have done the one before."""

    def __init__(self, device: int, rank: int, parts: int) -> None: ...
    @property
    def handle(self) -> bytes:
        """What opens this end's memory in another process."""
    @property
    def most_bytes(self) -> int:
        """The most bytes that a tensor may have."""
    def connect(self, handles: list[bytes], /) -> None: ...
    def check(self) -> None: ...
    def __call__(self, x: Tensor) -> None:
        """x, contiguous and in fp32, fp16 or bf16, becomes the sum of all GPUs' x, each of which makes the same sums in the
        same order: in fp32, in the order of ranks, rounded once. Does not wait."""

# What is here

def cpu_info() -> dict[str, Any]:
    """isa (str), threads (int), thread_runtime (str)."""

def cuda_info() -> dict[str, Any]:
    """built (bool), architectures (list[str]), fatbin_bytes (int), and, after asking the driver: driver (str or None),
    driver_version (int or None), devices (list of dicts: name, capability, memory), kernels (list[str]), missing (str: why not, or "")."""

def cuda_initialized() -> bool:
    """Whether this process has called cuInit through this module. Importing never does."""

def set_cuda_overlap(allowed: bool, /) -> bool:
    """Whether products may start as the kernel before them ends (programmatic dependent launch), in this process; True
    from the start. Gives what held before: for measurements of single launches."""

# The choice between kernels for packed weights. code: "int2", "int3", "int4", "int8", "table4" or "e4m3"; n, k and
# group_size are the weight's (group_size k where it has one group), dtype is that of x, m its rows.

Code = Literal["int2", "int3", "int4", "int8", "table4", "e4m3"]

def choice_bucket(m: int, /) -> int:
    """The rows up to which a choice for m rows of x counts."""

def candidates(
    device: int, code: Code, n: int, k: int, group_size: int, dtype: Dtype, m: int
) -> list[tuple[str, int]]:
    """What can run such products on this GPU: (kernel, launch parameter), the table's own choice first."""

def set_choice(
    device: int, code: Code, n: int, k: int, group_size: int, dtype: Dtype, m: int, kernel: str | None, parameter: int
) -> None:
    """From now on such products run so, in this process; kernel None: as the table says. ValueError for a kernel that is
    not among the candidates."""
