"""Every format's files for a small model that needs no transformers, and ways to break them."""

import copy
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
from qlinear.checkpoint import load_checkpoint

Q = "layers.0.q_proj"
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
    "fp8-e8m0-blocks": (
        formats.fp8("block", "weight_scale_inv", torch.float8_e8m0fnu),
        FP8 | {"weight_block_size": [128, 128], "scale_fmt": "ue8m0"},
        qlinear.Fp8Linear,
    ),
    "fp8-bytes-blocks": (
        formats.with_bytes(formats.fp8("block", "weight_scale_inv", torch.float8_e8m0fnu)),
        FP8 | {"weight_block_size": [128, 128], "scale_fmt": "ue8m0"},
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


def written(tmp_path, name="gptq4", change=None, **options):
    """(the dense model, the directory) of a format, with more tensors or without some."""
    dense, tensors = quantized_files(FORMATS[name][0], **options)
    tensors = dict(tensors) if change is None else change(dict(tensors), {})
    return dense, write_directory(tmp_path, tensors, FORMATS[name][1])


def held(model):
    """Who every module, parameter and buffer of a model is, and what is in it."""
    tensors = {name: (id(t), t.clone()) for name, t in (*model.named_parameters(), *model.named_buffers())}
    return [id(module) for module in model.modules()], tensors


def real():
    """A model with memory of its own."""
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


# Changes to (the tensors, the config) of a directory; the tensors come back.


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


def said_of_weights(**values):
    """A changed config of compressed-tensors' weights."""

    def change(tensors, config):
        group = copy.deepcopy(config["config_groups"]["group_0"])
        group["weights"] |= values
        config["config_groups"] = {"group_0": group}
        return tensors

    return change


def listed(name=Q, **values):
    """A config that lists the layers, with a change to one."""

    def change(tensors, config):
        layers = {key.removesuffix(".weight_scale"): {"format": "fp8"} for key in tensors if key.endswith("_scale")}
        layers[name] |= values
        config.clear()
        config.update(quant_method="qlinear", layers=layers)
        return tensors

    return change


def shape(*sizes, dtype=torch.int64):
    return changed(f"{Q}.weight_shape", lambda _: torch.tensor(sizes, dtype=dtype))
