"""Small models of real architectures as published checkpoints: quantized files, and the dense model of their weights.

Where a format quantizes activations too, the dense model's layers do so in float64, by the format's rule.
"""

import functools
import json

import numpy as np
import torch
import transformers
from checkpoint_files import write_directory
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

# Marlin takes 64 outputs, which keys and values have too.
VOCABULARY, HIDDEN, INNER = 48, 128, 192
SIZES = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 8, "max_position_embeddings": 64}
ENDS = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}


def llama(**options):
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=4, **ENDS, **options)
    return transformers.LlamaForCausalLM(config)


def qwen2():
    return transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**SIZES, num_key_value_heads=4, tie_word_embeddings=True, **ENDS)
    )


def gpt2():
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=64, **ENDS)
    return transformers.GPT2LMHeadModel(config)


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, type_vocab_size=2))


MODELS = {"llama": llama, "qwen2": qwen2, "gpt2": gpt2, "bert": bert}


def dense(architecture):
    """The same weights whenever it is called."""
    torch.manual_seed(0)
    return MODELS[architecture]().eval()


# What makers of quantized files leave as it is.
SKIPPED = ("lm_head", "cls.predictions")


def linear_layers(model, skip=SKIPPED):
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and not name.startswith(skip)
    }


def float8(x):
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype)


def by_row(x):
    """int8, rows by their absmax."""
    most = x.abs().amax(-1, keepdim=True)
    return torch.where(most > 0, (x * (127 / most)).round() * most / 127, 0)


def by_row_with_outliers(x):
    """LLM.int8(): entries from 6 on do not count for the absmax, their columns stay as they are."""
    large = x.abs() >= 6
    columns = large.flatten(0, -2).any(0)
    most = x.masked_fill(large, 0).abs().amax(-1, keepdim=True)
    codes = torch.where(most > 0, (x * (127 / most)).round() * most / 127, 0)
    return torch.where(columns, x, codes)


def by_token(x):
    scale = (x.abs().amax(-1, keepdim=True) / 448).clamp_min(1 / (448 * 512))
    return float8(x / scale) * scale


def by_group(x):
    return torch.cat([by_token(part) for part in x.split(128, -1)], -1)


def by_scale(x, scale=0.01):
    return float8(x / scale) * scale


class Exact(nn.Module):
    """F.linear in float64, after the activations were quantized and brought back."""

    def __init__(self, weight, bias, activation):
        super().__init__()
        self.weight, self.bias, self.activation = weight.double(), bias, activation

    def forward(self, x):
        wide = self.activation(x.double())
        out = F.linear(wide, self.weight, None if self.bias is None else self.bias.double())
        return out.to(x.dtype)


@functools.cache
def quantized(architecture, write, activation=None, *, skip=SKIPPED, size=32, **options):
    """(the dense model, the tensors of its files): norms and biases random too, so that none may be lost."""
    torch.manual_seed(len(architecture))
    rng = np.random.default_rng(0)
    model = MODELS[architecture](**options).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0 if "norm" in name.lower() and "bias" not in name else 0.0, 0.2)
    nn.init.normal_(model.get_input_embeddings().weight)
    tensors, layers = {}, linear_layers(model, skip)
    for name, module in layers.items():
        N, K = module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]
        made, W = write(rng, N, K, size)
        tensors |= {f"{name}.{key}": tensor for key, tensor in made.items()}
        W = torch.from_numpy(np.ascontiguousarray(W, np.float32))
        if module.bias is not None:
            tensors[f"{name}.bias"] = module.bias.detach()
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Exact(W, module.bias, activation or (lambda x: x)))
    tied = set(model.all_tied_weights_keys)
    for name, tensor in model.state_dict().items():
        if name not in tied and name.rpartition(".")[0] not in layers:
            tensors[name] = tensor
    return model, tensors


def write_model(directory, model, tensors, config=None, files=1):
    """The directory as its maker would have put it on the Hub."""
    write_directory(directory, tensors, files=files)
    values = json.loads(model.config.to_json_string())
    values |= {"architectures": [type(model).__name__], "dtype": "float32"}
    if config is not None:
        values["quantization_config"] = config
    (directory / "config.json").write_text(json.dumps(values))
    return directory


IDS = torch.arange(1, 17).reshape(2, 8) * 5 % VOCABULARY


@torch.no_grad()
def tokens(model, count=12):
    """What the model says, greedily; of BERT, what it puts in each place."""
    if not model.can_generate():
        return model(input_ids=IDS).logits.argmax(-1)
    return model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=count, do_sample=False)


@torch.no_grad()
def distance(model, other):
    """Between their logits, relative."""
    left, right = (one(input_ids=IDS).logits.double() for one in (model, other))
    return ((left - right).norm() / right.norm()).item()


def agree(model, dense, tolerance=2e-5):
    """The same tokens, and more than a few of them, from logits that are as close as fp32 lets them be."""
    said = tokens(dense)
    assert len(said.unique()) > 1 or not dense.can_generate()
    assert torch.equal(tokens(model), said)
    assert distance(model, dense) < tolerance
