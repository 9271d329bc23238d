"""Broken checkpoints: each is refused with an error that says what is wrong where, and the model is unchanged."""

import pytest
import torch
from checkpoint_cases import (
    FORMATS,
    TOKEN,
    Q,
    added,
    changed,
    listed,
    quantized_files,
    real,
    renamed,
    said,
    said_of_weights,
    shape,
    state,
    unchanged,
    without,
)
from checkpoint_files import write_directory


def also_without_a_module(tensors, config):
    """A layer's tensors under names that a dot begins."""
    return tensors | {
        name.removeprefix(Q): tensor for name, tensor in tensors.items() if name.startswith(f"{Q}.weight")
    }


FILE = "model.safetensors: "
F8 = torch.zeros(4, 64, 64).to(torch.float8_e4m3fn)
# (the format, what is done to its files, what the error says of it)
BROKEN = [
    ("gptq4", without(f"{Q}.qzeros"), f"{Q}: lacks {Q}.qzeros, it has bias, g_idx, qweight, scales"),
    ("gptq4", without(f"{Q}.scales"), f"{Q}: lacks {Q}.scales"),
    ("gptq4", without(f"{Q}.qweight"), f"{Q}: {FILE}{Q}.g_idx belongs to a quantized weight, which is not there"),
    ("gptq4", without(f"{Q}.bias"), f"missing: {Q}.bias"),
    ("gptq4", without("layers.1.norm.weight"), "missing: layers.1.norm.weight"),
    ("gptq4", without("embed.weight"), "missing: embed.weight"),
    ("gptq4", added("more", torch.zeros(2)), "unexpected: more"),
    ("gptq4", added("layers.2.q_proj.weight", torch.zeros(2)), "unexpected: layers.2.q_proj.weight"),
    ("gptq4", added(f"{Q}.weight", torch.zeros(64, 64)), f"unexpected: {Q}.weight"),
    (
        "gptq4",
        added("layers.0.v_proj.bias", torch.ones(64)),
        "unexpected: layers.0.v_proj.bias is not zero, the model's",
    ),
    (
        "gptq4",
        added("layers.0.v_proj.bias", torch.ones(65)),
        r"layers.0.v_proj.bias must have the shape \[64\], has \[65\]",
    ),
    ("gptq4", changed(f"{Q}.bias", torch.Tensor.int), f"{Q}.bias must be float16 or bfloat16 or float32, is int32"),
    (
        "gptq4",
        changed(f"{Q}.scales", torch.Tensor.int),
        f"{FILE}{Q}.scales must be float16 or bfloat16 or float32, is int32",
    ),
    ("gptq4", changed(f"{Q}.qweight", torch.Tensor.long), f"{FILE}{Q}.qweight must be int32 or int16, is int64"),
    ("gptq4", changed(f"{Q}.qzeros", torch.Tensor.float), f"{FILE}{Q}.qzeros must be int32, is float32"),
    ("gptq4", changed(f"{Q}.g_idx", torch.Tensor.float), f"{FILE}{Q}.g_idx must be int32 or int64, is float32"),
    ("gptq4", changed(f"{Q}.g_idx", lambda t: t + 2), f"{FILE.strip()} {Q}: g_idx must be in"),
    (
        "gptq4",
        changed(f"{Q}.g_idx", lambda t: t[9:]),
        f"{Q}: {FILE}qweight .* are no storage of GPTQ or AWQ that is known",
    ),
    ("gptq4", changed(f"{Q}.qweight", lambda t: t[1:]), f"{Q}: {FILE}qweight .* are no storage of GPTQ or AWQ"),
    ("gptq4", changed(f"{Q}.qzeros", lambda t: t[:, 1:]), f"{Q}: {FILE}qweight .* are no storage of GPTQ or AWQ"),
    ("gptq4", changed(f"{Q}.scales", lambda t: t[0]), rf"{Q}.scales must have two dimensions, has \[64\]"),
    ("gptq4", changed("norm.weight", torch.Tensor.int), r"norm.weight is torch.int32, the model's is torch.float32"),
    ("gptq4", changed("norm.weight", lambda t: t[1:]), r"norm.weight has the shape \[63\], the model's has \[64\]"),
    (
        "gptq4",
        changed("embed.weight", lambda t: t.to(F8.dtype)),
        f"embed: {FILE}embed.weight must have one weight_scale",
    ),
    ("gptq4", said(bits=8), f"{Q}: config.json says quant_method gptq and 8 bits, the tensors are gptq, .*, 4 bits"),
    ("gptq4", said(bits="4"), "config.json: bits must be positive .*, got '4'"),
    ("gptq4", said(group_size=16), "config.json says group_size 16, the tensors are 2 groups of 64 inputs"),
    ("gptq4", said(quant_method="awq"), f"{Q}: config.json says quant_method awq and 4 bits, the tensors are gptq"),
    ("gptq4", said(quant_method="exl2"), "config.json: quant_method 'exl2' is not among those that can be loaded"),
    ("gptq4", said(quant_method=["gptq"]), "config.json: quant_method .* is not among those that can be loaded"),
    ("gptq4", said(checkpoint_format="other"), "config.json says checkpoint_format other, which is not implemented"),
    ("gptq4", said(modules_to_not_convert=["q_proj"]), f"{Q}: config.json says that it is not quantized .*q_proj"),
    ("gptq4", said(dynamic={"-:.*q_proj": {}}), f"{Q}: config.json says that it is not quantized .*dynamic"),
    ("gptq4", said(dynamic={"+:.*q_proj": {"bits": 8}}), f"{Q}: config.json says quant_method gptq and 8 bits"),
    (
        "gptq4",
        renamed("q_proj.qweight", "q_proj.Qidxs"),
        f"{Q}: {FILE}QuIP#, which is not implemented",
    ),
    (
        "awq",
        said(quant_method="gptq"),
        f"{Q}: config.json says quant_method gptq and 4 bits, the tensors are awq, gemm",
    ),
    ("awq", changed(f"{Q}.qweight", lambda t: t[1:]), f"{Q}: config.json says group_size 32|the model's 64 and 64"),
    ("awq-gemv", said(group_size=1), "config.json says group_size 1, the tensors are 32 padded groups"),
    (
        "eetq",
        changed(f"{Q}.weight_scales", lambda t: t[1:]),
        rf"{Q}.weight_scales must have the shape \[64\], has \[63\]",
    ),
    (
        "eetq",
        changed(f"{Q}.weight", lambda t: t[1:]),
        r"must be \[K, N\] with K % 64 == 0 and N % 2 == 0, is \[63, 64\]",
    ),
    ("eetq", changed(f"{Q}.weight", lambda t: t.view(torch.uint8)), f"{FILE}{Q}.weight must be int8, is uint8"),
    ("eetq", without(f"{Q}.weight_scales"), f"{FILE}{Q}.weight is torch.int8, the model's is torch.float32"),
    (
        "eetq",
        renamed("q_proj.weight_scales", "q_proj.weight_scale"),
        f"{Q}: config.json says quant_method eetq, the tensors are compressed-tensors, int-quantized",
    ),
    ("int8", changed(f"{Q}.SCB", lambda t: t.half()), f"{FILE}{Q}.SCB must be float32, is float16"),
    ("int8", changed(f"{Q}.weight_format", lambda t: t + 1), f"{Q}: weight_format must be 0"),
    (
        "int8",
        said(load_in_4bit=True, load_in_8bit=False),
        f"{Q}: config.json says quant_method bitsandbytes, the tensors",
    ),
    (
        "int8",
        said(llm_int8_threshold=-1),
        "config.json: llm_int8_threshold must be a number that is not negative, got -1",
    ),
    ("nf4", without(f"{Q}.weight.absmax"), f"{Q}: lacks {Q}.weight.absmax"),
    (
        "nf4",
        without("q_proj.weight.quant_state.bitsandbytes__nf4"),
        f"{Q}: there must be exactly one {Q}.weight.quant_state",
    ),
    ("nf4", changed(f"{Q}.weight", lambda t: t[1:]), rf"{Q}.weight must have 2048 bytes for \[64, 64\], has 2047"),
    (
        "nf4",
        changed(f"{Q}.weight.absmax", lambda t: t[1:]),
        rf"{Q}.weight.absmax must have the shape \[64\], has \[63\]",
    ),
    ("nf4", changed(f"{Q}.weight.quant_map", lambda t: t[1:]), rf"{Q}.weight.quant_map must have the shape \[16\]"),
    ("nf4", state(shape=[64]), r"shape must be \[out_features, in_features\], got \[64\]"),
    ("nf4", state(shape=[32, 128]), rf"{Q}.bias must have the shape \[32\], has \[64\]"),
    ("nf4", state(blocksize=0), "blocksize must be a positive integer, got 0"),
    ("nf4", state(quant_type="fp4"), "quant_type is 'fp4', not nf4 or fp4 as its name"),
    ("nf4", state(code="x"), f"{Q}: quant_state must be an object with fields among"),
    ("nf4", state(nested_offset=0.5), f"{Q}: lacks {Q}.weight.nested_absmax"),
    ("nf4", state(dtype="int8"), f"{FILE}{Q}: quant_state's dtype must be one of"),
    ("nf4", said(bnb_4bit_quant_type="fp4"), f"{Q}: config.json says bnb_4bit_quant_type fp4, the tensors are nf4"),
    (
        "fp8-scalar",
        without(f"{Q}.weight_scale"),
        f"{FILE}{Q}.weight must have one weight_scale or weight_scale_inv, has 0",
    ),
    (
        "fp8-scalar",
        changed(f"{Q}.weight_scale", lambda t: t.repeat(3)),
        f"{Q}.weight_scale must have one element, 64 or",
    ),
    (
        "fp8-scalar",
        changed(f"{Q}.weight", lambda t: t.to(torch.float8_e5m2)),
        f"{Q}: {FILE}float8_e5m2 weights, which is",
    ),
    (
        "fp8-scalar",
        said(activation_scheme="static"),
        "config.json says activation_scheme static, the tensors are without",
    ),
    (
        "fp8-static",
        said(activation_scheme="dynamic"),
        "config.json says activation_scheme dynamic, the tensors are with input",
    ),
    ("fp8-static", without("weight_scale"), f"{Q}: {FILE}{Q}.weight must have one weight_scale"),
    ("fp8-blocks", said(weight_block_size=[32, 32]), r"config.json says weight_block_size \[32, 32\], the tensors are"),
    (
        "fp8-blocks",
        said(weight_block_size=128),
        "config.json: weight_block_size must be two positive integers, got 128",
    ),
    (
        "fp8-scalar",
        added("layers.0.experts.gate_up", F8),
        f"layers.0.experts: {FILE}fused experts in FP8, which is not impl",
    ),
    ("fp8-scalar", added(f"{Q}.weight_scale_2", torch.ones(1)), f"{Q}: {FILE}modelopt NVFP4, which is not implemented"),
]
STATIC = TOKEN | {"dynamic": False, "strategy": "tensor"}
BROKEN += [
    ("packed", without(f"{Q}.weight_scale"), f"{Q}: lacks {Q}.weight_scale, it has bias, weight_packed, weight_shape"),
    ("packed", without(f"{Q}.weight_shape"), f"{Q}: lacks {Q}.weight_shape"),
    (
        "packed",
        without(f"{Q}.weight_packed"),
        f"{Q}: {FILE}{Q}.weight_scale belongs to a quantized weight, which is not",
    ),
    ("packed", also_without_a_module, r"unexpected: \.weight_packed"),
    ("packed", shape(64, 128), f"{Q}: config.json says num_bits 4, the tensors are 2-bit codes"),
    ("packed", shape(64, 2**62), f"{Q}: {FILE}compressed-tensors 4-bit codes, which is not implemented"),
    ("packed", shape(64, -64), rf"{Q}: {FILE}{Q}.weight_packed is \[64, 8\], weight_shape \[64, -64\]"),
    ("packed", shape(32, 64), rf"{Q}: {FILE}{Q}.weight_packed is \[64, 8\], weight_shape \[32, 64\]"),
    ("packed", shape(64, 60), f"{Q}: gptq: has 60 inputs and 64 outputs, the model's 64 and 64"),
    ("packed", shape(64, 64, 1), rf"{FILE}{Q}.weight_shape must have the shape \[2\], has \[3\]"),
    ("packed", shape(64, 64, dtype=torch.float32), f"{FILE}{Q}.weight_shape must be int64 or int32, is float32"),
    ("packed", changed(f"{Q}.weight_packed", torch.Tensor.long), f"{FILE}{Q}.weight_packed must be int32, is int64"),
    ("packed", changed(f"{Q}.weight_packed", lambda t: t[0]), rf"{FILE}{Q}.weight_packed is \[8\], weight_shape"),
    (
        "packed",
        changed(f"{Q}.weight_scale", lambda t: t[1:]),
        rf"{Q}.weight_scale must be \[64, groups\], is \[63, 2\]",
    ),
    ("packed", changed(f"{Q}.weight_scale", torch.Tensor.int), f"{Q}.weight_scale must be float16 or .*, is int32"),
    ("packed", said_of_weights(num_bits=8), f"{Q}: config.json says num_bits 8, the tensors are 4-bit codes"),
    ("packed", said_of_weights(num_bits="4"), "config.json: bits must be positive .*, got '4'"),
    ("packed", said_of_weights(group_size=16), "config.json says group_size 16, the tensors are 2 groups of 64 inputs"),
    (
        "packed",
        said_of_weights(symmetric=False),
        f"{Q}: config.json says symmetric false, the tensors are without weight",
    ),
    ("packed", said(ignore=["re:.*q_proj"]), f"{Q}: config.json says that it is not quantized .*ignore: re:"),
    ("packed", said(ignore=["re:("]), r"'\(' is not a regular expression"),
    (
        "packed",
        said(quant_method="gptq"),
        f"{Q}: config.json says quant_method gptq, the tensors are compressed-tensors, pack-quantized",
    ),
    ("packed", said(transform_config={"config_groups": {"a": {}}}), "config.json: transform_config is not implemented"),
    (
        "packed",
        said(sparsity_config={"format": "sparse-24-bitmask"}),
        "config.json: sparsity_config is not implemented",
    ),
    (
        "packed",
        added(f"{Q}.meta", torch.zeros(2)),
        f"{Q}: {FILE}compressed-tensors marlin-24, which is not implemented",
    ),
    (
        "packed",
        said(quant_method="awq"),
        f"{Q}: config.json says quant_method awq, the tensors are compressed-tensors, pack-quantized",
    ),
    (
        "packed-asymmetric",
        changed(f"{Q}.weight_zero_point", lambda t: t[1:]),
        rf"{Q}.weight_zero_point must have the shape \[8, 2\], has \[7, 2\]",
    ),
    (
        "packed-asymmetric",
        changed(f"{Q}.weight_zero_point", torch.Tensor.float),
        f"{Q}.weight_zero_point must be int32 or int8, is float32",
    ),
    ("packed-act-order", changed(f"{Q}.weight_g_idx", lambda t: t + 2), f"{FILE.strip()} {Q}: g_idx must be in"),
    (
        "packed-act-order",
        changed(f"{Q}.weight_g_idx", lambda t: t[1:]),
        rf"{Q}.weight_g_idx must have the shape \[64\], has \[63\]",
    ),
    (
        "integers",
        changed(f"{Q}.weight_scale", lambda t: t[1:]),
        rf"{Q}.weight_scale must be one element or \[64, groups\]",
    ),
    (
        "integers",
        changed(f"{Q}.weight", lambda t: t.view(torch.uint8)),
        f"{Q}: {FILE}MXFP4 or MXFP8, which is not impl",
    ),
    ("integers", changed(f"{Q}.weight", lambda t: t[None]), rf"{Q}.weight must have two dimensions, has \[1, 64, 64\]"),
    ("integers", added(f"{Q}.input_scale", torch.ones(1)), f"{Q}.input_scale: int8 with zeros, or with a fixed scale"),
    ("integers", added(f"{Q}.weight_zero_point", torch.ones(1)), f"{Q}.weight_zero_point: int8 with zeros, or with a"),
    ("integers", said_of_weights(num_bits=4), f"{Q}: config.json says num_bits 4, the tensors are int8"),
    (
        "integers",
        said_of_weights(group_size=48),
        f"{Q}: config.json says group_size 48, the tensors are 1 groups of 64",
    ),
    (
        "integers",
        said(config_groups={"a": {"targets": ["Linear"], "weights": {}, "input_activations": STATIC}}),
        f"{Q}: config.json: input_activations dynamic false: int8 is implemented with activations by token",
    ),
    (
        "compressed-fp8-static",
        said(config_groups={"a": {"targets": ["Linear"], "weights": {}, "input_activations": TOKEN}}),
        f"{Q}: config.json says input_activations token, the tensors are with input_scale",
    ),
    (
        "compressed-fp8-static",
        changed(f"{Q}.input_scale", lambda _: torch.ones(2)),
        rf"{Q}.input_scale must have one element, has \[2\]",
    ),
    (
        "compressed-fp8-token",
        said(config_groups={"a": {"targets": ["Linear"], "input_activations": TOKEN | {"strategy": "tensor_group"}}}),
        "config.json: input_activations: strategy 'tensor_group' is not implemented",
    ),
    (
        "compressed-fp8-blocks",
        said_of_weights(block_structure=[32, 32]),
        rf"config.json says weight_block_size \[32, 32\], the tensors are {FILE}{Q}.weight_scale \[1, 1\]",
    ),
    (
        "compressed-fp8-blocks",
        said_of_weights(block_structure="128"),
        "weight_block_size must be two positive integers",
    ),
    (
        "fbgemm-bound",
        said(activation_scale_ub=7.0),
        f"{Q}: config.json says activation_scale_ub 7.0, the tensors are with",
    ),
    ("fbgemm-bound", changed(f"{Q}.input_scale_ub", torch.Tensor.neg), f"{Q}: .*with an input_scale_ub of -1200.0"),
    (
        "fbgemm-bound",
        said(activation_scale_ub=float("inf")),
        "activation_scale_ub must be a number that is not negative",
    ),
    ("fbgemm", said(quant_method="eetq"), f"{Q}: config.json says quant_method eetq, the tensors are fp8, per channel"),
    (
        "modelopt-blocks",
        changed(f"{Q}.weight_scale", lambda t: t.expand(-1, 2, -1, -1)),
        rf"{Q}.weight_scale must have one element, 64 or a grid of \[1, 1\], has \[1, 2, 1, 1\]",
    ),
    ("modelopt", added("layers.0.experts.weight_scale", torch.ones(2, 3, 4)), f"layers.0.experts: {FILE}fused experts"),
    (
        "auto-round-gptq",
        said(packing_format="auto_round:auto_awq"),
        f"{Q}: config.json says quant_method intel/auto-round",
    ),
    (
        "auto-round-gptq",
        said(extra_config={Q: {"bits": 16}}),
        f"{Q}: config.json says .* 16 bits|not quantized .*extra_config",
    ),
    (
        "auto-round-awq",
        said(extra_config={Q: {"group_size": 16}}),
        "config.json says group_size 16, the tensors are 2 groups",
    ),
    ("fp8-channel", listed(format="eetq"), f"{Q}: config.json says quant_method qlinear, the tensors are fp8"),
    ("fp8-channel", listed(format=None), f"{Q}: config.json says quant_method qlinear, the tensors are fp8"),
    ("fp8-channel", listed(activation="all"), "config.json: activation must be one of none, static, .*, got 'all'"),
    ("fp8-channel", listed(activation="static"), f"{Q}: config.json says activation static, the tensors are without"),
    (
        "fp8-channel",
        listed(activation="token", activation_scale_ub=-1),
        "activation_scale_ub must be a number that is not",
    ),
]


@pytest.mark.parametrize(("name", "change", "error"), BROKEN, ids=[f"{case[0]}-{at}" for at, case in enumerate(BROKEN)])
def test_a_broken_checkpoint_is_refused_and_the_model_unchanged(tmp_path, name, change, error):
    write, config, _ = FORMATS[name]
    config = dict(config)
    tensors = change(dict(quantized_files(write)[1]), config)
    write_directory(tmp_path, tensors, config)
    unchanged(real(), tmp_path, error)
