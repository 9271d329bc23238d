"""The benchmarks' Llama is transformers', and what they report of whole models is what was measured."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import spawn
from torch.nn import functional as F

pytest.importorskip("rich")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def benchmarks():
    sys.path.insert(0, str(Path(__file__).parent.parent))
    yield lambda name: importlib.import_module(f"benchmarks.{name}")
    sys.path.pop(0)


def tiny(benchmarks):
    return benchmarks("llama").Config(64, 96, 2, 4, 2, head_dim=16, vocab=50)


def theirs(config):
    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=config.hidden,
            intermediate_size=config.intermediate,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            vocab_size=config.vocab,
            rms_norm_eps=config.eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.base},
            tie_word_embeddings=False,
        )
    ).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return made


def ours(benchmarks, config, model):
    """The same weights, fused."""
    llama = benchmarks("llama")
    fused = {"qkv": ("self_attn", "q_proj", "k_proj", "v_proj"), "o": ("self_attn", "o_proj"),
             "gate_up": ("mlp", "gate_proj", "up_proj"), "down": ("mlp", "down_proj")}  # fmt: skip

    def make(name, k, n):
        index, _, which = name.partition(".")
        place, *parts = fused[which]
        owner = getattr(model.model.layers[int(index)], place)
        weight = torch.cat([getattr(owner, part).weight.detach() for part in parts])
        assert weight.shape == (n, k)
        return lambda x: F.linear(x, weight)

    norms = [w for layer in model.model.layers for w in (layer.input_layernorm, layer.post_attention_layernorm)]
    return llama.Llama(
        config,
        make,
        embedding=model.model.embed_tokens.weight.detach(),
        head=model.lm_head,
        norms=torch.stack([norm.weight.detach() for norm in (*norms, model.model.norm)]),
        glue=llama.TorchGlue(),
    )


@torch.no_grad()
def test_llama_is_that_of_transformers(benchmarks):
    config = tiny(benchmarks)
    model = theirs(config)
    own = ours(benchmarks, config, model)
    cache = benchmarks("llama").Cache(config, 2, 16, "cpu", torch.float32)
    tokens = torch.randint(0, config.vocab, (2, 9), generator=torch.Generator().manual_seed(1))
    expected = model(tokens).logits
    torch.testing.assert_close(own(tokens[:, :6], cache), expected[:, 5], rtol=1e-4, atol=1e-5)
    for place in range(6, 9):
        cache.place.fill_(place)
        logits = own(tokens[:, place : place + 1], cache)
        torch.testing.assert_close(logits, expected[:, place], rtol=1e-4, atol=1e-5)


def process_of_two(rank, directory):
    """One of two processes with half of every layer: writes what comes out of all blocks."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    benchmarks = lambda name: importlib.import_module(f"benchmarks.{name}")  # noqa: E731

    def reduce(x):
        dist.all_reduce(x)
        return x

    out = stack(benchmarks, rank, 2, reduce)
    torch.save(out, f"{directory}/{rank}.pt")


def stack(benchmarks, rank, parts, reduce):
    """The blocks of a random model, or one process' part of them, run on one token after another."""
    llama, config = benchmarks("llama"), tiny(benchmarks)
    own = config.part(parts)
    shapes = llama.layer_shapes(config)
    torch.manual_seed(0)
    weights = {f"{i}.{name}": torch.randn(n, k) / k**0.5 for i in range(2) for name, (k, n) in shapes.items()}
    sizes = {"qkv": [16 * count for count in (config.heads, config.kv_heads, config.kv_heads)], "gate_up": [96, 96]}

    def make(name, k, n):
        which, weight = name.partition(".")[2], weights[name]
        if which in sizes:
            fused = [part.chunk(parts)[rank] for part in weight.split(sizes[which])]
            weight = torch.cat(fused)
            assert weight.shape == (n, k)
            return lambda x: F.linear(x, weight)
        part = weight.chunk(parts, 1)[rank]
        assert part.shape == (n, k)
        return lambda x: reduce(F.linear(x, part))

    model = llama.Llama(
        own,
        make,
        embedding=torch.empty(0),
        head=None,
        norms=torch.rand(5, config.hidden) + 0.5,
        glue=llama.TorchGlue(),
    )
    cache, outputs = llama.Cache(own, 1, 8, "cpu", torch.float32), []
    for place in range(4):
        cache.place.fill_(place)
        outputs.append(model.hidden(torch.randn(1, 1, config.hidden), cache))
    return torch.cat(outputs)


def test_two_parts_are_the_whole(benchmarks, tmp_path):
    spawn(process_of_two, tmp_path, world=2)
    whole = stack(benchmarks, 0, 1, lambda x: x)
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), whole, rtol=1e-4, atol=1e-5)


def test_the_benchmark_of_several_processes_runs(benchmarks, tmp_path, capsys):
    parallel = benchmarks("parallel")
    config = benchmarks("llama").Config(256, 512, 2, 4, 2, head_dim=64, vocab=50)
    file = tmp_path / "rows.json"
    parallel.run(parallel.Options(("gptq-4", "nf4-double"), config, rounds=2, device="cpu", json=file))
    content = json.loads(file.read_text())
    assert [(row["format"], row["sums"]) for row in content["rows"]] == [
        ("gptq-4", "by gloo"),
        ("nf4-double", "by gloo"),
    ]
    assert all(0.45 < row["part_bytes"] / row["bytes"] < 0.6 for row in content["rows"])
    assert all(row["met"] == (row["one_ms"] / row["ms"] >= 1.6) for row in content["rows"])
    assert "A decode step of 2 blocks" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["model", "parallel"])
def test_the_commands_know_their_formats(benchmarks, monkeypatch, command):
    monkeypatch.setattr(sys, "argv", ["benchmarks", command, "--formats", "gptq-4", "gguf"])
    with pytest.raises(SystemExit, match="no format gguf; there are gptq-4, awq, "):
        benchmarks("__main__").main()


def measured(name, **ratios):
    row = {key: {"ms": 2.0, "fp16_ms": 2.0 * ratio, "x_fp16": ratio} for key, ratio in ratios.items()}
    return {"format": name, "allocated": 4_000_000, "stored": 3_950_000, "x_memory": 4 / 3.95} | row


def results(model):
    rows = [
        measured("gptq-4", **{"1": 2.5, "16": 1.5, "prompt": 0.9}),
        measured("eetq", **{"1": 1.5, "16": 1.1, "prompt": 1.0}),
        measured("nf4-double", **{"1": 1.5, "16": 0.9, "prompt": 1.0}),
    ]
    return {"about": {"gpu": "Some GPU", "layers": 2}, "fp16_bytes": 14_000_000, "rows": [*map(model.judged, rows)]}


def test_a_model_is_judged_by_what_is_asked(benchmarks):
    gptq, eetq, double = results(benchmarks("model"))["rows"]
    assert gptq["met"] == {"1": True, "16": True, "prompt": False, "memory": True}
    assert eetq["met"] == {"1": False, "16": True, "prompt": True, "memory": True}
    assert double["met"] == {"1": True, "16": False, "prompt": True, "memory": True}


def test_the_table_and_the_plot_of_a_model(benchmarks, tmp_path, monkeypatch):
    model, report = benchmarks("model"), benchmarks("report")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    file = tmp_path / "run.json"
    file.write_text(json.dumps(results(model)))
    model.rewrite(file)
    text = (tmp_path / "model-some-gpu.md").read_text()
    assert "| fp16 | 333 | 7273 | 1024000 | 0.01 |" in text
    assert "| gptq-4 | 500: 2.50x ✓ | 8000: 1.50x ✓ | 1024000: 0.90x ✗ | 0.00 | 1.013 x its files ✓ |" in text
    assert json.loads((tmp_path / "model-some-gpu.json").read_text())["rows"][0]["format"] == "gptq-4"
    pytest.importorskip("matplotlib")
    assert (tmp_path / "model-some-gpu.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that torch can use")
@pytest.mark.parametrize(
    ("batch", "count", "place"), [(1, 1, 0), (1, 1, 130), (3, 1, 17), (1, 1, 511), (2, 5, 0), (32, 1, 300)]
)
def test_the_glue_on_a_gpu_is_that_of_torch(benchmarks, batch, count, place):
    llama = benchmarks("llama")
    config = llama.Config(1032, 520, 1, 8, 2, vocab=50)
    generator = torch.Generator("cuda").manual_seed(0)
    random = lambda *shape: torch.randn(*shape, device="cuda", generator=generator).half()  # noqa: E731
    rows = batch * count
    glues, seen = (llama.TorchGlue(), llama.CudaGlue()), []
    inputs = [random(rows, 1032), random(rows, 1032), random(1032), random(rows, 12 * 128), random(rows, 1040)]
    caches = random(2, 1, batch, 2, 512, 128)
    for glue in glues:
        x, delta, weight, qkv, both = (tensor.clone() for tensor in inputs)
        cache = llama.Cache(config, batch, 512, "cuda", torch.float16)
        cache.keys, cache.values = caches.clone()
        cache.place.fill_(place)
        first = glue.add_norm(x.clone(), None, weight, 1e-5)
        normed = glue.add_norm(x, delta, weight, 1e-5)
        q = glue.turn_and_store(qkv, cache, 0, config, batch, count)
        prompt = (q, cache.keys.clone(), cache.values.clone())
        cache.keys, cache.values = caches.clone()
        out = glue.attend(qkv, cache, 0, config, batch) if count == 1 else q
        torch.cuda.synchronize()
        seen.append((first, x, normed, *prompt, cache.keys, cache.values, out, glue.gate(both)))
    for ours, theirs in zip(*reversed(seen), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=4e-3, atol=4e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that torch can use")
@pytest.mark.parametrize(("rows", "vocab"), [(1, 128256), (16, 128256), (3, 8), (2, 8200)])
def test_the_likeliest_token_is_picked(benchmarks, rows, vocab):
    llama = benchmarks("llama")
    cache = llama.Cache(llama.Config(1032, 520, 1, 8, 2), rows, 64, "cuda", torch.float16)
    glue, tokens = llama.CudaGlue(), torch.zeros(rows, 1, dtype=torch.int64, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    for place, sign in enumerate((1, -1, 1)):
        # Few values, so that the greatest is there more than once.
        logits = torch.randint(1, 99, (rows, vocab), device="cuda", generator=generator).half() * sign
        glue.pick(tokens, logits, cache)
        assert torch.equal(logits.gather(1, tokens), logits.amax(1, keepdim=True))
        earlier = torch.arange(vocab, device="cuda") < tokens
        assert not (earlier & (logits == logits.amax(1, keepdim=True))).any()
        assert int(cache.place) == place + 1
