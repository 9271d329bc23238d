"""load_checkpoint and inspect: each format written by the tests' own writers, and the broken directories refused."""

import functools
import json

import checkpoint_formats as formats
import numpy as np
import pytest
import torch
from checkpoint_files import write_directory
from torch import nn
from torch.nn import functional as F

import qlinear
from qlinear.__main__ import main
from qlinear.checkpoint import load_checkpoint

HIDDEN, INNER, VOCABULARY = 64, 192, 48


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(HIDDEN)
        self.q_proj = nn.Linear(HIDDEN, HIDDEN, bias=True)
        self.v_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.gate_proj = nn.Linear(HIDDEN, INNER, bias=False)
        self.down_proj = nn.Linear(INNER, HIDDEN, bias=False)
        self.register_buffer("inv_freq", torch.ones(3), persistent=False)

    def forward(self, x):
        normed = self.norm(x)
        x = x + torch.softmax(self.q_proj(normed), -1) * self.v_proj(normed)
        return x + self.down_proj(F.silu(self.gate_proj(x)))


class Small(nn.Module):
    """The parts of a Llama that matter to a loader: blocks, norms, tied embeddings, a buffer that no file has."""

    def __init__(self, tied=True):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.RMSNorm(HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


@functools.cache
def quantized_files(write, size=32, *, tied=True, skip=("lm_head",), seed=0):
    """(the dense model, the tensors of its files), its linear layers but those in skip quantized by a writer."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    dense, tensors = Small(tied).eval(), {}
    for name, module in dense.named_modules():
        if isinstance(module, nn.Linear) and name not in skip:
            made, W = write(rng, *module.weight.shape, size)
            tensors |= {f"{name}.{key}": tensor for key, tensor in made.items()}
            module.weight = nn.Parameter(torch.from_numpy(np.ascontiguousarray(W, np.float32)))
    quantized = {name.rpartition(".")[0] for name in tensors}
    for name, tensor in dense.state_dict().items():
        prefix, _, key = name.rpartition(".")
        if not (prefix in quantized and key == "weight") and not (tied and name == "lm_head.weight"):
            tensors[name] = tensor
    return dense, tensors


def empty(tied=True):
    """A model to load into, with no memory; its buffer that no file has is computed."""
    with torch.device("meta"):
        model = Small(tied)
    for layer in model.layers:
        layer.inv_freq = torch.ones(3)
    return model.eval()


GPTQ = {"quant_method": "gptq", "group_size": 32, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32}
BNB = {"quant_method": "bitsandbytes"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
W8A16 = {
    "quant_method": "compressed-tensors",
    "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": None}},
}
# name: (writer, config, class).
FORMATS = {
    "gptq2": (formats.gptq(2), GPTQ | {"bits": 2}, qlinear.QuantLinear),
    "gptq3": (formats.gptq(3), GPTQ | {"bits": 3}, qlinear.QuantLinear),
    "gptq4": (formats.gptq(4), GPTQ | {"bits": 4}, qlinear.QuantLinear),
    "gptq8": (formats.gptq(8), GPTQ | {"bits": 8}, qlinear.QuantLinear),
    "gptq-v2": (formats.gptq(4, version=2), GPTQ | {"checkpoint_format": "gptq_v2"}, qlinear.QuantLinear),
    "gptq-act-order": (formats.gptq(4, act_order=True), GPTQ | {"desc_act": True}, qlinear.QuantLinear),
    "gptq-no-config": (formats.gptq(4, act_order=True), None, qlinear.QuantLinear),
    "gptq3-no-g_idx": (formats.gptq(3, g_idx=False), GPTQ | {"bits": 3}, qlinear.QuantLinear),
    "gptq3-planar": (
        formats.gptq(3, version=2, pack=formats.planar),
        GPTQ | {"checkpoint_format": "gptq_p"},
        qlinear.QuantLinear,
    ),
    "gptq-sym-v2-says-v1": (formats.gptq(4, version=2, sym=True), GPTQ, qlinear.QuantLinear),
    "auto-round": (formats.gptq(4), GPTQ | {"quant_method": "auto-round"}, qlinear.QuantLinear),
    "awq": (formats.awq_gemm, AWQ | {"version": "gemm"}, qlinear.AWQLinear),
    "awq-no-config": (formats.awq_gemm, None, qlinear.AWQLinear),
    "awq-gemv": (formats.awq_gemv, AWQ | {"version": "gemv"}, qlinear.AWQLinear),
    "awq-gemv_fast": (formats.awq_gemv_fast, AWQ | {"version": "gemv_fast"}, qlinear.AWQLinear),
    "awq-marlin": (formats.marlin(), AWQ | {"version": "marlin"}, qlinear.AWQLinear),
    "gptq-marlin": (formats.marlin("B", "s"), GPTQ | {"checkpoint_format": "marlin"}, qlinear.AWQLinear),
    "eetq": (formats.eetq, {"quant_method": "eetq", "weights": "int8"}, qlinear.EETQLinear),
    "int8": (formats.int8, BNB | {"load_in_8bit": True, "load_in_4bit": False}, qlinear.Linear8bitLt),
    "nf4": (formats.fourbit("nf4", False), BNB | {"load_in_4bit": True, "load_in_8bit": False}, qlinear.Linear4bit),
    "nf4-nested": (formats.fourbit("nf4", True), BNB | {"load_in_4bit": True}, qlinear.Linear4bit),
    "fp4": (formats.fourbit("fp4", False), None, qlinear.Linear4bit),
    "nf4-bf16-storage": (formats.fourbit("nf4", True, torch.bfloat16), BNB, qlinear.Linear4bit),
    "fp8-scalar": (formats.fp8("scalar"), FP8, qlinear.Fp8Linear),
    "fp8-static": (
        formats.fp8("tensor", input_scale=True),
        FP8 | {"activation_scheme": "static"},
        qlinear.Fp8Linear,
    ),
    "fp8-channel": (formats.fp8("channel", dtype=torch.bfloat16), W8A16, qlinear.Fp8Linear),
    "fbgemm": (
        formats.fp8("channel"),
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
        qlinear.Fp8Linear,
    ),
    "fp8-blocks": (
        formats.fp8("block", "weight_scale_inv"),
        FP8 | {"weight_block_size": [128, 128]},
        qlinear.Fp8Linear,
    ),
}


def compressed(bits=8, size=None, *, kind="int", activations=None, **weights):
    """compressed-tensors' config of one group."""
    weights |= {"num_bits": bits, "type": kind, "group_size": size}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


TOKEN = {"num_bits": 8, "dynamic": True, "strategy": "token"}
AUTO_ROUND = {"quant_method": "intel/auto-round", "bits": 4, "group_size": 32}
FORMATS |= {
    "auto-round-gptq": (
        formats.gptq(4, sym=True),
        AUTO_ROUND | {"packing_format": "auto_round:auto_gptq", "extra_config": {"lm_head": {"bits": 16}}},
        qlinear.QuantLinear,
    ),
    "auto-round-awq": (formats.awq_gemm, AUTO_ROUND | {"packing_format": "auto_round:auto_awq"}, qlinear.AWQLinear),
    "awq-marlin-row": (formats.marlin_row, AWQ | {"version": "marlin", "group_size": -1}, qlinear.AWQLinear),
    "packed": (formats.compressed(4), compressed(4, 32, symmetric=True), qlinear.QuantLinear),
    "packed-no-config": (formats.compressed(4, dtype=torch.bfloat16), None, qlinear.QuantLinear),
    "packed-8": (formats.compressed(8, zeros="unordered"), compressed(8, 32, symmetric=True), qlinear.QuantLinear),
    "packed-2": (formats.compressed(2), compressed(2, 32), qlinear.QuantLinear),
    "packed-asymmetric": (formats.compressed(4, sym=False), compressed(4, 32, symmetric=False), qlinear.QuantLinear),
    "packed-asymmetric-int8": (
        formats.compressed(4, sym=False, zeros="plain"),
        compressed(4, 32, symmetric=False),
        qlinear.QuantLinear,
    ),
    "packed-act-order": (
        formats.compressed(4, sym=False, act_order=True),
        compressed(4, 32, actorder="group"),
        qlinear.QuantLinear,
    ),
    "packed-tensor": (formats.compressed(8, scalar=True), compressed(8, strategy="tensor"), qlinear.QuantLinear),
    "integers": (formats.integers("channel"), compressed(strategy="channel", activations=TOKEN), qlinear.Linear8bitLt),
    "integers-fp32": (
        formats.integers("channel", torch.float32),
        compressed(strategy="channel", activations=TOKEN),
        qlinear.Linear8bitLt,
    ),
    "integers-no-config": (formats.integers("tensor"), None, qlinear.Linear8bitLt),
    "integers-w8a16": (formats.integers("channel"), compressed(strategy="channel"), qlinear.QuantLinear),
    "integers-w8a16-groups": (formats.integers("group"), compressed(8, 32, strategy="group"), qlinear.QuantLinear),
    "integers-w8a16-tensor": (formats.integers("tensor"), compressed(strategy="tensor"), qlinear.QuantLinear),
    "compressed-fp8-static": (
        formats.fp8("tensor", dtype=torch.bfloat16, input_scale=True),
        compressed(kind="float", strategy="tensor", activations=TOKEN | {"dynamic": False, "strategy": "tensor"}),
        qlinear.Fp8Linear,
    ),
    "compressed-fp8-token": (
        formats.fp8("channel", dtype=torch.bfloat16),
        compressed(kind="float", strategy="channel", activations=TOKEN),
        qlinear.Fp8Linear,
    ),
    "compressed-fp8-blocks": (
        formats.fp8("block"),
        compressed(
            kind="float",
            strategy="block",
            block_structure=[128, 128],
            activations=TOKEN | {"strategy": "group", "group_size": 128},
        ),
        qlinear.Fp8Linear,
    ),
    "fbgemm-bound": (
        formats.with_bound(formats.fp8("channel")),
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
        qlinear.Fp8Linear,
    ),
    "modelopt": (
        formats.fp8("scalar", input_scale=True),
        {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["lm_head"]},
        qlinear.Fp8Linear,
    ),
    "modelopt-channel": (
        formats.fp8("channel"),
        {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        qlinear.Fp8Linear,
    ),
    "modelopt-blocks": (
        formats.with_dimensions(formats.fp8("block")),
        {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"},
        qlinear.Fp8Linear,
    ),
    "fp8-bf16-blocks": (
        formats.fp8("block", "weight_scale_inv", torch.bfloat16),
        FP8 | {"weight_block_size": [128, 128]},
        qlinear.Fp8Linear,
    ),
}
# Where activations are quantized too, the outputs are off by as much.
TOLERANCES = {
    name: 0.1
    for name, (_, _, kind) in FORMATS.items()
    if kind in (qlinear.Linear8bitLt, qlinear.Fp8Linear) and name not in ("fp8-channel", "modelopt-blocks")
}


def agree(model, dense, tolerance):
    """Every quantized layer's weight is the dense one, and so, as far as activations are not quantized, the outputs."""
    for name, module in model.named_modules():
        if isinstance(module, qlinear.layers._module.QuantizedLinear):
            expected = dense.get_submodule(name).weight
            torch.testing.assert_close(module.dequantize(torch.float32), expected, rtol=2e-6, atol=1e-7)
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        out, expected = model(ids), dense(ids)
    assert (out - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize(("name", "files"), [(name, 1 + at % 3) for at, name in enumerate(FORMATS)])
def test_a_loaded_model_is_the_dense_one_of_its_weights(tmp_path, name, files):
    write, config, kind = FORMATS[name]
    dense, tensors = quantized_files(write)
    write_directory(tmp_path, tensors, config, files=files)
    model = empty()
    report = load_checkpoint(model, tmp_path, progress=False)
    assert len(report.replaced) == 8
    assert all(type(model.get_submodule(layer)) is kind for layer in report.replaced)
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.embed.weight
    agree(model, dense, TOLERANCES.get(name, 1e-5))
    kept = {key: tensor for key, tensor in model.state_dict().items() if key in tensors}
    if not any(converted in name for converted in ("gemv", "marlin", "planar", "packed", "integers", "bound", "opt-b")):
        assert kept.keys() == tensors.keys()
        for key, tensor in kept.items():
            assert tensor.dtype == tensors[key].dtype
            assert torch.equal(tensor.reshape(-1).view(torch.uint8), tensors[key].reshape(-1).view(torch.uint8)), key


def without(*ends):
    return lambda tensors, config: {name: tensor for name, tensor in tensors.items() if not name.endswith(ends)}


def changed(name, change):
    return lambda tensors, config: tensors | {name: change(tensors[name])}


def added(name, tensor):
    return lambda tensors, config: tensors | {name: tensor}


def said(**values):
    def change(tensors, config):
        config.update(values)
        return tensors

    return change


def state(**numbers):
    """A changed JSON of a 4-bit layer."""

    def change(tensors, config):
        name = f"{Q}.weight.quant_state.bitsandbytes__nf4"
        known = json.loads(bytes(tensors[name].tolist())) | numbers
        return tensors | {name: torch.tensor(list(json.dumps(known).encode()), dtype=torch.uint8)}

    return change


def renamed(end, to):
    return lambda tensors, config: {
        (name.removesuffix(end) + to if name.endswith(end) else name): tensor for name, tensor in tensors.items()
    }


Q = "layers.0.q_proj"
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
        f"{Q}: {FILE}{Q}.weight_scale must be one element or",
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


def held(model):
    """Who every module, parameter and buffer of a model is, and what is in it."""
    tensors = {name: (id(t), t.clone()) for name, t in (*model.named_parameters(), *model.named_buffers())}
    return [id(module) for module in model.modules()], tensors


@pytest.fixture(scope="module")
def real():
    torch.manual_seed(1)
    return Small().eval()


def unchanged(model, directory, error):
    modules, before = held(model)
    with pytest.raises(ValueError, match=error):
        load_checkpoint(model, directory)
    now, after = held(model)
    assert now == modules
    assert after.keys() == before.keys()
    for name, (identity, tensor) in before.items():
        assert after[name][0] == identity
        assert torch.equal(after[name][1], tensor)


@pytest.mark.parametrize(("name", "change", "error"), BROKEN, ids=[f"{case[0]}-{at}" for at, case in enumerate(BROKEN)])
def test_a_broken_checkpoint_is_refused_and_the_model_unchanged(tmp_path, real, name, change, error):
    write, config, _ = FORMATS[name]
    config = dict(config)
    tensors = change(dict(quantized_files(write)[1]), config)
    write_directory(tmp_path, tensors, config)
    unchanged(real, tmp_path, error)


def written(tmp_path, name="gptq4", change=None, **options):
    """(the dense model, the directory) of a format, with more tensors or without some."""
    dense, tensors = quantized_files(FORMATS[name][0], **options)
    tensors = dict(tensors) if change is None else change(dict(tensors), {})
    return dense, write_directory(tmp_path, tensors, FORMATS[name][1])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
def test_an_error_in_the_middle_leaves_the_model_as_it_was(tmp_path, real, monkeypatch, error):
    _, directory = written(tmp_path)
    made, calls = qlinear.QuantLinear.from_tensors, []

    def failing(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 5:
            raise error("in the middle")
        return made(*arguments, **options)

    monkeypatch.setattr(qlinear.QuantLinear, "from_tensors", failing)
    modules, before = held(real)
    with pytest.raises(error, match="in the middle"):
        load_checkpoint(real, directory)
    now, after = held(real)
    assert now == modules
    assert all(after[name][0] == identity for name, (identity, _) in before.items())


def test_a_model_with_memory_of_its_own_is_loaded_too(tmp_path):
    dense, directory = written(tmp_path)
    model = Small().train()
    model.embed.weight.requires_grad_(False)
    assert load_checkpoint(model, directory).replaced
    assert model.layers[0].q_proj.training
    assert not model.embed.weight.requires_grad
    assert model.norm.weight.requires_grad
    agree(model.eval(), dense, 1e-5)


def test_dtype_is_that_of_biases_and_of_what_is_not_quantized(tmp_path):
    _, directory = written(tmp_path)
    model = empty()
    load_checkpoint(model, directory, dtype=torch.bfloat16)
    assert model.embed.weight.dtype == model.norm.weight.dtype == torch.bfloat16
    assert model.layers[0].q_proj.bias.dtype == torch.bfloat16
    assert model.layers[0].q_proj.scales.dtype == torch.float16
    for dtype in (torch.int8, torch.float8_e4m3fn, "float16"):
        with pytest.raises(TypeError, match="dtype must be a floating-point dtype or None"):
            load_checkpoint(empty(), directory, dtype=dtype)


def test_a_quantized_lm_head_is_no_longer_tied(tmp_path):
    dense, directory = written(tmp_path, tied=False, skip=())
    model = empty(tied=True)
    load_checkpoint(model, directory)
    assert type(model.lm_head) is qlinear.QuantLinear
    agree(model, dense, 1e-5)


def test_tied_tensors_may_be_in_the_files_twice_if_they_are_the_same(tmp_path, real):
    dense, directory = written(
        tmp_path, change=lambda tensors, _: tensors | {"lm_head.weight": tensors["embed.weight"]}
    )
    model = empty()
    load_checkpoint(model, directory)
    agree(model, dense, 1e-5)
    written(tmp_path, change=lambda tensors, _: tensors | {"lm_head.weight": tensors["embed.weight"] + 1})
    unchanged(real, directory, "embed.weight and lm_head.weight are one tensor in the model, but differ in the files")


def test_formats_may_be_mixed_and_layers_left_as_they_are(tmp_path):
    rng = np.random.default_rng(3)
    dense, tensors = Small(), {}
    writers = {
        "layers.0.q_proj": formats.gptq(8), "layers.0.v_proj": formats.awq_gemm, "layers.0.gate_proj": formats.eetq,
        "layers.1.q_proj": formats.fourbit("nf4", True), "layers.1.down_proj": formats.gptq(3, act_order=True),
    }  # fmt: skip
    tensors = {name: tensor for name, tensor in dense.state_dict().items() if name != "lm_head.weight"}
    for name, write in writers.items():
        module = dense.get_submodule(name)
        made, W = write(rng, *module.weight.shape, 32)
        module.weight = nn.Parameter(torch.from_numpy(np.ascontiguousarray(W, np.float32)))
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{key}": tensor for key, tensor in made.items()}
    model = empty()
    report = load_checkpoint(model, write_directory(tmp_path, tensors))
    assert sorted(report.replaced) == sorted(writers)
    agree(model.eval(), dense.eval(), 1e-5)


def test_a_zero_bias_that_the_model_lacks_and_a_plain_model(tmp_path):
    dense, directory = written(tmp_path, change=added("layers.0.v_proj.bias", torch.zeros(HIDDEN)))
    model = empty()
    load_checkpoint(model, directory)
    agree(model, dense, 1e-5)
    plain = {name: tensor for name, tensor in dense.state_dict().items() if name != "lm_head.weight"}
    model = empty()
    assert load_checkpoint(model, write_directory(tmp_path / "plain", plain)).replaced == []
    ids = torch.arange(8)[None]
    assert torch.equal(model(ids), dense(ids))
    with pytest.raises(ValueError, match="says quant_method gptq, but no tensor is quantized"):
        load_checkpoint(model, write_directory(tmp_path / "plain", plain, GPTQ))


def test_modules_that_cannot_be_replaced(tmp_path):
    _, directory = written(tmp_path)

    def refused(change, error):
        model = empty()
        change(model)
        with pytest.raises(ValueError, match=error):
            load_checkpoint(model, directory)

    class Other(nn.Linear):
        pass

    block = "layers.0.q_proj: gptq: "
    refused(lambda m: m.layers[0].q_proj.register_forward_hook(print), f"{block}cannot be replaced: it has hooks")
    refused(lambda m: setattr(m.layers[0], "q_proj", Other(64, 64)), f"{block}cannot be replaced: Other is a subclass")
    refused(lambda m: setattr(m.layers[0], "q_proj", nn.Identity()), f"{block}in the model it is a Identity")
    refused(lambda m: setattr(m.layers[0], "q_proj", nn.Linear(64, 32)), f"{block}has 64 inputs and 64 outputs")
    refused(lambda m: delattr(m.layers[0], "q_proj"), f"{block}the model has no such module")
    refused(lambda m: setattr(m.layers[1], "q_proj", m.layers[0].q_proj), "layers.1.q_proj and layers.0.q_proj are one")
    refused(
        lambda m: m.register_buffer("table", torch.empty(2, device="meta"), persistent=False), "table: is a buffer on"
    )


def test_one_layer_under_two_names_is_replaced_under_both(tmp_path):
    _, directory = written(tmp_path)
    model = empty()
    model.also = model.layers[0].q_proj
    load_checkpoint(model, directory)
    assert model.also is model.layers[0].q_proj
    assert type(model.also) is qlinear.QuantLinear


def test_a_loaded_model_loads_another_checkpoint(tmp_path):
    model = empty()
    load_checkpoint(model, written(tmp_path / "gptq")[1])
    dense, directory = written(tmp_path / "awq", "awq", seed=2)
    load_checkpoint(model, directory)
    agree(model, dense, 1e-5)


def test_the_layers_of_gpt_2_are_replaced(tmp_path):
    class Conv1D(nn.Module):
        def __init__(self, nf, nx):
            super().__init__()
            self.nf, self.weight, self.bias = nf, nn.Parameter(torch.empty(nx, nf)), nn.Parameter(torch.empty(nf))

    made, W = formats.gptq(4)(np.random.default_rng(0), 96, 64, 32)
    bias = torch.arange(96.0)
    model = nn.Sequential(Conv1D(96, 64))
    load_checkpoint(model, write_directory(tmp_path, {f"0.{key}": t for key, t in made.items()} | {"0.bias": bias}))
    x = torch.eye(64)
    torch.testing.assert_close(model(x), torch.from_numpy(np.ascontiguousarray(W.T, np.float32)) + bias)


def inspected(capsys, *arguments):
    code = main(["inspect", *map(str, arguments)])
    return code, capsys.readouterr()


@pytest.mark.parametrize("name", FORMATS)
def test_inspect_tells_what_a_directory_holds(tmp_path, capsys, name):
    _, tensors = quantized_files(FORMATS[name][0])
    _, directory = written(tmp_path, name)
    code, output = inspected(capsys, directory, "--json")
    found = json.loads(output.out)
    assert code == 0
    assert found["refused"] == {}
    assert len(found["layers"]) == 8
    of_layers = sum(layer["bytes"] for layer in found["layers"])
    assert of_layers + found["plain"]["bytes"] == found["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    (first,) = (layer for layer in found["layers"] if layer["name"] == "layers.0.gate_proj")
    own = sum(tensor.nbytes for key, tensor in tensors.items() if key.startswith("layers.0.gate_proj."))
    assert (first["in_features"], first["out_features"], first["bytes"]) == (HIDDEN, INNER, own)
    assert first["bits_per_weight"] == round(8 * own / (HIDDEN * INNER), 3)


def test_inspect_prints_a_table_and_what_would_be_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    _, directory = written(tmp_path)
    code, output = inspected(capsys, directory)
    assert code == 0
    assert "config.json says gptq" in output.out
    assert "4 bits, group_size 32" in output.out
    written(tmp_path, change=renamed("q_proj.qweight", "q_proj.Qidxs"))
    code, output = inspected(capsys, directory)
    assert code == 1
    assert "2 would be refused" in output.out
    assert "QuIP#, which is not implemented" in output.out
    code, output = inspected(capsys, tmp_path / "absent")
    assert code == 2
    assert "is not a directory" in output.err
