"""The README's code, as it stands there, on small models under the names that it uses."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not (importlib.util.find_spec("transformers") and importlib.util.find_spec("peft")):
    pytest.skip("transformers or peft is not installed", allow_module_level=True)

import checkpoint_formats as formats
from checkpoint_cases import FORMATS
from hf_models import dense, quantized, write_model

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)

# What a block takes for granted, and what must be so after it.
BLOCKS_OF_PYTHON = [
    (
        "",
        "assert report.replaced and [name for name, _ in report.skipped] == ['lm_head'];"
        "assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear",
    ),
    ("", "same_files('Llama-3-8B-AWQ', 'copy')"),
    (
        "config = model.config",
        "assert type(model.model.layers[0].mlp.up_proj) is qlinear.AWQLinear",
    ),
    ("", "assert tuned.print_trainable_parameters() is None; model = tuned.unload()"),
    ("", "assert type(model.model.layers[0].mlp.up_proj) is qlinear.AWQLinear"),
]
PREAMBLE = f"""
import sys
sys.path.append({str(Path(__file__).parent)!r})
import torch
from test_saving import same_files
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

class MyLlama(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        with torch.device("cpu"):
            self.model.rotary_emb = LlamaRotaryEmbedding(config)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the models are that the README names."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("Qwen/Qwen2.5-0.5B", "Qwen2.5-0.5B"):
        dense("qwen2").save_pretrained(folder / name)
    model, tensors = quantized("llama", FORMATS["awq"][0])
    for name in ("Llama-3-8B-AWQ", "Llama-3-70B-AWQ"):
        (folder / name).mkdir()
        write_model(folder / name, model, tensors, FORMATS["awq"][1])
    model, tensors = quantized("llama", formats.awq_gemv)
    (folder / "Llama-3-8B-AWQ-GEMV").mkdir()
    write_model(folder / "Llama-3-8B-AWQ-GEMV", model, tensors, FORMATS["awq"][1] | {"version": "gemv"})
    return folder


def run(folder, *command):
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    environment = {**os.environ, **alone, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
    return done.stdout


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")],
        ),
    ],
)
def test_blocks_of_python_run_one_after_the_other(folder, device):
    """On one process where the README has two."""
    blocks = [code for language, code in BLOCKS if language == "python"]
    assert len(blocks) == len(BLOCKS_OF_PYTHON)
    lines = [PREAMBLE]
    for code, (before, after) in zip(blocks, BLOCKS_OF_PYTHON, strict=True):
        lines += [before, code.replace('"cuda", (2,)', f'"{device}", (1,)'), after]
    assert f'"{device}", (1,)' in lines[-2]
    script = folder / f"blocks-{device}.py"
    script.write_text("\n".join(lines))
    run(folder, script)


def test_commands_run(folder):
    text = "".join(code for language, code in BLOCKS if not language)
    commands = re.findall(r"^python -m (qlinear .*)$", text, re.MULTILINE)
    assert [command.split()[1] for command in commands] == ["quantize", "convert"]
    for command in commands:
        run(folder, "-m", *command.split())
    for name in ("Qwen2.5-0.5B-NF4", "Llama-3-8B-GPTQ"):
        assert "inspect DIR" in README
        run(folder, "-m", "qlinear", "inspect", name)
