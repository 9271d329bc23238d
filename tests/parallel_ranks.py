"""What each process of test_parallel.py does: every check in every process, with the outcomes in a file of its own."""

import itertools
import json
import os
import traceback
from pathlib import Path

import checkpoint_formats as formats
import numpy as np
import pytest
import torch
import torch.distributed as dist
from checkpoint_files import write_directory
from layer_cases import see_fp8, see_int8, see_plain
from parallel_cases import SPLITS
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

import qlinear
from qlinear import all_reduce, sharding

WORLD = 4
# K and N of the layer in the file.
FILE = (4096, 8192)
PLAN = {
    "block.up": "colwise",
    "block.down": "rowwise",
    "out": "colwise_gather_output",
    "into": "rowwise_split_input",
}


class Two(nn.Module):
    """up and down meet, without anything between them that would hide an error; out and into have whole neighbours."""

    def __init__(self, up, down):
        super().__init__()
        self.block = nn.Sequential()
        self.block.add_module("up", up)
        self.block.add_module("down", down)

    def forward(self, x):
        return self.block(x)


class One(nn.Module):
    def __init__(self, name, layer):
        super().__init__()
        self.add_module(name, layer)
        self.name = name

    def forward(self, x):
        return getattr(self, self.name)(x)


def see_groups(x, layer):
    """FP8 by groups of 128 features of a token, of which a layer's last may be shorter."""
    groups = [see_fp8(group.contiguous(), layer) for group in x.split(128, -1)]
    return np.concatenate(groups, -1)


def bound(W, x, eps, parts):
    """Of products accumulated in fp32 and, a part and a sum each, rounded to the dtype."""
    magnitude = np.abs(x) @ np.abs(W).T
    return ((W.shape[1] + 32) * 2.0**-24 + parts * eps) * magnitude + 1e-6


def values(x):
    return x.detach().double().cpu().numpy()


def activations(parts, K, dtype):
    generator = torch.Generator().manual_seed(K)
    return torch.randn(3, K, generator=generator).to(dtype)


# Half a step of x's codes, over the absmax of a token.
HALF_STEP = {"int8": 1 / 254, "token": 1 / 16}
SEE = {"int8": see_int8, "token": see_fp8, "static": see_fp8, "group": see_groups, "none": see_plain}


def quantization_bound(split, W, x):
    """By which a product differs where x is rounded to 8 bits by its tokens' absmax."""
    return HALF_STEP.get(split.x, 0) * np.abs(x).max(-1, keepdims=True) @ np.abs(W).sum(1)[None]


def seen_by_parts(split, layer, model, x, axis):
    """x as the format's quantizer makes it, of each part's inputs by themselves."""
    if axis == "column":
        return torch.from_numpy(np.asarray(SEE[split.x](x, layer)))
    (hook,) = model.into._forward_hooks.values()
    pieces = [SEE[split.x](x[:, begin:end], layer) for begin, end in itertools.pairwise(hook.bounds)]
    return torch.from_numpy(np.concatenate(pieces, 1))


def places(split, layer, axis):
    """How many parts there can be at most."""
    size = layer.in_features if axis == "row" else layer.out_features
    return -(-size // (sharding.row_step if axis == "row" else sharding.column_step)(layer).least)


def check_products(split, mesh, dtype):
    """Every style by itself at every size: against float64, and against one process."""
    parts, eps = mesh.size(), torch.finfo(dtype).eps
    for N, K, size in split.sizes:
        layer, W = split.layer(N, K, size)
        if isinstance(layer, nn.Linear):
            layer.to(dtype)
            W = layer.weight.detach().float().numpy()
        W, bias, x = W.astype(np.float64), values(layer.bias), activations(parts, K, dtype)
        alone = values(layer(x))
        allowed = bound(W, values(x), eps, parts + 1) + eps * (np.abs(alone) + np.abs(bias))
        for name, axis in (("out", "column"), ("into", "row")):
            where = (name, N, K, size)
            copy, _ = split.layer(N, K, size)
            model = One(name, copy.to(dtype) if isinstance(copy, nn.Linear) else copy)
            if places(split, layer, axis) < parts:
                with pytest.raises(ValueError, match="cannot be split exactly into"):
                    qlinear.parallelize(model, mesh, {name: PLAN[name]})
                continue
            qlinear.parallelize(model, mesh, {name: PLAN[name]})
            seen = values(model(x))
            of_parts = values(seen_by_parts(split, layer, model, x, axis)) @ W.T + bias
            assert (np.abs(seen - of_parts) <= allowed).all(), where
            # One process rounds x as parts of the outputs do, and by a static scale or groups as all parts do.
            own = 2 * quantization_bound(split, W, values(x)) if axis == "row" else 0
            assert (np.abs(seen - alone) <= allowed + own).all(), (*where, "alone")


def check_pair(split, mesh):
    """A column-parallel layer whose outputs are a row-parallel one's inputs."""
    N, K, size = split.sizes[0]

    def make():
        return Two(split.layer(K, K, size, seed=1)[0], split.layer(N, K, size)[0])

    model, whole = make(), make()
    x = activations(mesh.size(), model.block.up.in_features, torch.float32)
    hidden, alone = whole.block.up(x), values(whole(x))
    report = qlinear.parallelize(model, mesh, {name: PLAN[name] for name in ("block.up", "block.down")})
    assert report.replaced == ["block.up", "block.down"]
    assert report.bytes_after < report.bytes_before
    assert model.block.up.out_features == model.block.down.in_features < K
    down = whole.block.down
    W = values(down.weight if isinstance(down, nn.Linear) else down.dequantize(torch.float32))
    allowed = bound(W, values(hidden), 2.0**-23, mesh.size() + 1) + 1e-5 * np.abs(alone)
    rounded = 2 * quantization_bound(split, W, values(hidden))
    assert (np.abs(values(model(x)) - alone) <= allowed + rounded).all()


def assert_same_input_gradient(model, whole):
    gradients = []
    for one in (model, whole):
        x = activations(0, 64, torch.float32).requires_grad_()
        one(x).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3 * float(gradients[1].abs().max()))


def check_gradients(mesh):
    """Of the input, through all four styles, whose parts say different things to each other on the way back."""
    split = next(split for split in SPLITS if split.name == "gptq-4")
    make = lambda: nn.Sequential(  # noqa: E731
        *(One("into", split.layer(64, 64, 32)[0]), Two(split.layer(96, 64, 32)[0], split.layer(64, 96, 32)[0])),
        One("out", split.layer(64, 64, 32)[0]),
    )
    model, whole = make(), make()
    qlinear.parallelize(model, mesh, {"0.into": PLAN["into"], "2.out": PLAN["out"], "1.block.up": "colwise",
                                      "1.block.down": "rowwise"})  # fmt: skip
    assert_same_input_gradient(model, whole)


class Named(nn.Module):
    """Calls its layers by the name of their argument, as nn.Module lets one do."""

    def __init__(self, up, down):
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x):
        return self.down(x=self.up(x=x))


def check_inputs_by_name(mesh):
    """The gradient of what all processes share is the sum of all of theirs, and inputs are split, however x came."""
    split = next(split for split in SPLITS if split.name == "gptq-4")
    for plan in ({"up": "colwise", "down": "rowwise"}, {"down": PLAN["into"]}):
        make = lambda: Named(split.layer(96, 64, 32, seed=1)[0], split.layer(64, 96, 32)[0])  # noqa: E731
        model, whole = make(), make()
        qlinear.parallelize(model, mesh, plan)
        assert_same_input_gradient(model, whole)


class Headed(nn.Module):
    """A norm over each head between two layers that are split: a process has its own heads' part of the gradient."""

    def __init__(self, up, down):
        super().__init__()
        self.up, self.norm, self.down = up, nn.LayerNorm(8), down

    def forward(self, x):
        heads = self.norm(self.up(x).unflatten(-1, (-1, 8)))
        return self.down(heads.flatten(-2))


def check_norms_gradient(mesh):
    split = next(split for split in SPLITS if split.name == "gptq-4")
    make = lambda: Headed(split.layer(96, 64, 32, seed=1)[0], split.layer(64, 96, 32)[0])  # noqa: E731
    model, whole = make(), make()
    plan = {"up": "colwise", "norm": "replicated_with_grad_allreduce", "down": "rowwise"}
    report = qlinear.parallelize(model, mesh, plan)
    assert report.skipped == [("norm", "stays whole, by the plan")]
    for one in (model, whole):
        one(activations(0, 64, torch.float32)).square().sum().backward()
    for name in ("weight", "bias"):
        own, other = (getattr(one.norm, name).grad for one in (model, whole))
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def check_compile(mesh):
    """Whole graphs, what the processes say to each other among them."""
    split = next(split for split in SPLITS if split.name == "gptq-4")
    model = Two(split.layer(96, 64, 32)[0], split.layer(64, 96, 32)[0])
    head = One("out", split.layer(96, 64, 32)[0])
    qlinear.parallelize(model, mesh, {"block.up": "colwise", "block.down": "rowwise"})
    qlinear.parallelize(head, mesh, {"out": PLAN["out"]})
    for one in (model, head):
        compiled = torch.compile(one, fullgraph=True, backend="aot_eager")
        x = activations(0, 64, torch.float32)
        with torch.no_grad():
            assert torch.equal(compiled(x), one(x))
        gradients = []
        for call in (compiled, one):
            wanted = x.clone().requires_grad_()
            call(wanted).sum().backward()
            gradients.append(wanted.grad)
        torch.testing.assert_close(*gradients)


def check_uneven(mesh):
    """Sizes that no number of processes divides: every part is there, and none is much larger than another."""
    torch.manual_seed(0)
    layer, x = nn.Linear(101, 101), torch.randn(2, 101)
    for name in ("out", "into"):
        model = One(name, layer)
        qlinear.parallelize(model, mesh, {name: PLAN[name]})
        part = getattr(model, name)
        size = part.out_features if name == "out" else part.in_features
        assert size in {2: (51, 50), 4: (26, 25)}[mesh.size()]
        torch.testing.assert_close(model(x), layer(x))


def check_file_is_read_in_part(mesh, directory):
    """The pages of the file that a process has touched are those of its own part, of 2 MiB at most each."""
    K, N = FILE
    with torch.device("meta"):
        model = One("out", nn.Linear(K, N, bias=False))
    qlinear.load_checkpoint(model, directory)
    assert resident(directory) <= 2**21
    # Only while parts are taken from it the file stays mapped.
    whole = model.out
    qlinear.parallelize(model, mesh, {"out": "colwise_gather_output"})
    read = resident(directory)
    assert 0 <= read - N * K // mesh.size() < 2.5 * 2**21, read
    x = activations(0, K, torch.float32)
    torch.testing.assert_close(model(x), whole(x))
    del whole
    assert resident(directory) == 0


def resident(directory):
    """Bytes of the file's mappings that are in this process' memory."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and ":" not in line.split()[0]:
            ours = str(directory) in line
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def llama(heads=4, kv_heads=2):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=101,
        head_dim=32,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).eval()


def check_llama(mesh, quantize, options):
    """transformers' own plan, heads shared out, over a whole model with its cache."""
    kv_heads = mesh.size()
    tokens = torch.arange(12).view(1, 12)
    models = []
    for _ in range(2):
        model = llama(2 * kv_heads, kv_heads)
        qlinear.replace_linear(model, quantize, **options)
        models.append(model)
    model, whole = models
    report = qlinear.parallelize(model, mesh)
    assert len(report.replaced) == 15
    attention = model.model.layers[0].self_attn
    assert attention.k_proj.out_features == 32
    assert attention.q_proj.out_features == attention.o_proj.in_features == 64
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, whole(tokens).logits, rtol=1e-3, atol=1e-4)
        one, other = (m.generate(tokens, max_new_tokens=8, do_sample=False) for m in (model, whole))
    assert torch.equal(one, other)


def check_checkpoint(mesh, directory):
    """A published model: from its files, mapped, to its parts."""
    model, whole = (qlinear.from_pretrained(directory, dtype=torch.float32) for _ in range(2))
    report = qlinear.parallelize(model, mesh)
    assert len(report.replaced) == 15
    tokens = torch.arange(12).view(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, whole(tokens).logits, rtol=1e-3, atol=1e-4)


def check_refusal(mesh):
    """All processes refuse alike, with nothing changed."""
    from transformers import PreTrainedModel

    model = llama(2, 1)
    assert isinstance(model, PreTrainedModel)
    before = list(model.modules())
    with pytest.raises(ValueError, match="1 heads to share out"):
        qlinear.parallelize(model, mesh)
    assert list(model.modules()) == before


def checks(mesh, directory):
    for split in SPLITS:
        yield f"products-{split.name}", lambda split=split: check_products(split, mesh, torch.float32)
        yield f"pair-{split.name}", lambda split=split: check_pair(split, mesh)
    for name in ("gptq-4", "nf4-double", "eetq", "dense"):
        split = next(split for split in SPLITS if split.name == name)
        for dtype in (torch.bfloat16, torch.float16):
            yield (
                f"products-{name}-{str(dtype)[6:]}",
                lambda split=split, dtype=dtype: check_products(split, mesh, dtype),
            )
    yield "gradients", lambda: check_gradients(mesh)
    yield "inputs-by-name", lambda: check_inputs_by_name(mesh)
    yield "norms-gradient", lambda: check_norms_gradient(mesh)
    yield "compile", lambda: check_compile(mesh)
    yield "uneven", lambda: check_uneven(mesh)
    yield "file", lambda: check_file_is_read_in_part(mesh, f"{directory}/model")
    yield "checkpoint", lambda: check_checkpoint(mesh, f"{directory}/llama")
    yield "refusal", lambda: check_refusal(mesh)
    yield "llama-gptq", lambda: check_llama(mesh, "gptq", {"group_size": 32})
    yield "llama-eetq", lambda: check_llama(mesh, "eetq", {})


def names():
    return [name for name, _ in checks(None, None)]


def write_files(directory):
    model = llama(8, 4)
    qlinear.replace_linear(model, "awq", group_size=32)
    qlinear.save_pretrained(model, f"{directory}/llama")
    tensors, _ = formats.int8(np.random.default_rng(0), *reversed(FILE), 0)
    write_directory(Path(directory, "model"), {f"out.{name}": tensor for name, tensor in tensors.items()})


def run(rank, directory):
    """In each of the processes. One that fails leaves the others waiting or out of step: it stops, and so do they."""
    meshes = {size: DeviceMesh("cpu", list(range(size))) for size in (2, 4)}
    outcomes = {}
    for size, mesh in meshes.items():
        for name, check in checks(mesh, directory) if rank < size else ():
            try:
                check()
                outcomes[f"{name}-{size}"] = ""
            except Exception:
                outcomes[f"{name}-{size}"] = traceback.format_exc()
            Path(directory, f"{rank}.json").write_text(json.dumps(outcomes))
            if outcomes[f"{name}-{size}"]:
                os._exit(0)


def run_on_gpus(rank, is_two):
    """A pair of layers of each weight-only format against the same in one process: on two GPUs in a CUDA graph, on one
    GPU for both processes by way of gloo."""
    device = torch.device("cuda", rank if is_two else 0)
    torch.cuda.set_device(device)
    mesh = DeviceMesh("cuda", [0, 1])
    torch.cuda.set_device(device)
    for split in SPLITS:
        if split.name not in ("gptq-4", "gptq-4-act-order", "awq", "eetq", "nf4", "nf4-double"):
            continue
        whole = Two(split.layer(512, 1024, 128, seed=1)[0], split.layer(256, 512, 128)[0]).to(device)
        model = Two(split.layer(512, 1024, 128, seed=1)[0], split.layer(256, 512, 128)[0])
        report = qlinear.parallelize(model, mesh, {name: PLAN[name] for name in ("block.up", "block.down")})
        assert "\n  sums: from memory to memory up to " in str(report)
        assert model.block.up.device == device
        # Groups that act-order leaves unequal are for the base kernels.
        assert (model.block.down._buffers["packed"] is not None) == (split.name != "gptq-4-act-order")
        x = activations(0, 1024, torch.float16).to(device)
        with torch.no_grad():
            hidden = whole.block.up(x)
            alone, eager = values(whole(x)), model(x)
            if is_two:
                assert torch.equal(captured(model, x), eager), split.name
        W = values(whole.block.down.dequantize(torch.float32))
        # Both round the hidden values and, in wgmma's kernels, the weights to fp16.
        allowed = 2 * bound(W, values(hidden), 2.0**-10, 3) + 2.0**-9 * np.abs(alone)
        assert (np.abs(values(eager) - alone) <= allowed).all(), split.name


def captured(model, x):
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = model(x)
    graph.replay()
    torch.cuda.synchronize()
    return out


def sum_on_gpus(rank, world):
    """Sums of processes that have a GPU each, or share them; each knows what the others have."""
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    group = dist.group.WORLD
    said = all_reduce.connect(group, device)
    assert said.startswith(f"from memory to memory up to {most_bytes(world)} bytes, by "), said
    assert all_reduce.connect(group, device) == said
    check_sums(rank, device, group)
    check_sums_in_a_row(rank, device, group)
    if world > 2:
        return
    for check in (check_sums_on_streams, check_sums_of_graphs, check_compiled_sums):
        check(rank, device, group)
    all_reduce.disconnect(group)
    check_sums(rank, device, group)


def most_bytes(world):
    return (16 << 20) // world**2


def parts_of(count, dtype, device, world):
    """All processes' parts, with values that are none among them."""
    generator = torch.Generator().manual_seed(count)
    parts = [torch.randn(count, generator=generator).to(dtype) for _ in range(world)]
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    for part, place, value in zip(parts, (0, 3), (float("nan"), float("-inf")), strict=False):
        if count > 9:
            part[place] = value
            # The bits that stand for nothing in an inbox, in a word of their own and in half of one.
            part.view(bits)[[4, 5, 7]] = -1
    return [part.to(device) for part in parts]


def same(one, other):
    """But for which NaN it is."""
    return torch.equal(one.nan_to_num(123), other.nan_to_num(123)) and torch.equal(one.isnan(), other.isnan())


def check_sums(rank, device, group):
    world = group.size()
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for count in (0, 1, 2, 7, 8, 9, 1000, 4096, 8193, 131073, 1 << 20, (1 << 21) + 1):
            if world > 2 and count * dtype.itemsize > most_bytes(world):
                continue  # for the backend, which rounds as it likes
            parts = parts_of(count + 1, dtype, device, world)
            total = sum(part.float() for part in parts).to(dtype)
            for begin in (0, 1):
                x = parts[rank].clone()
                all_reduce.all_reduce_(x[begin:count], group)
                assert same(x[begin:count], total[begin:count]), (dtype, count, begin)
                assert same(x[count:], parts[rank][count:]), (dtype, count, begin)
    parts = [torch.arange(24.0, device=device).view(4, 6) + 100 * i for i in range(world)]
    x = parts[rank].clone()
    all_reduce.all_reduce_(x.t(), group)
    assert torch.equal(x, sum(parts))


def check_sums_in_a_row(rank, device, group):
    """No other wait between them, sizes that change, and now one process late, now another."""
    world = group.size()
    sizes = torch.randint(1, 200_000, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    summed = [torch.full((size,), float(i % 50 + 100 * rank), device=device).half() for i, size in enumerate(sizes)]
    for i, x in enumerate(summed):
        if i % 29 == 11 * rank:
            torch.cuda._sleep(300_000)
        all_reduce.all_reduce_(x, group)
    for i, x in enumerate(summed):
        assert (x == world * (i % 50) + 50 * world * (world - 1)).all(), i


def check_sums_on_streams(rank, device, group):
    streams = [torch.cuda.Stream(device) for _ in range(2)]
    summed = [torch.full((5000 + 7000 * (i % 3),), float(i + rank), device=device) for i in range(40)]
    torch.cuda.synchronize()
    for i, x in enumerate(summed):
        with torch.cuda.stream(streams[i % 5 % 2]):
            if i % 7 == 3 * rank:
                torch.cuda._sleep(300_000)
            all_reduce.all_reduce_(x, group)
    torch.cuda.synchronize()
    for i, x in enumerate(summed):
        assert (x == 2 * i + 1).all(), i


def check_sums_of_graphs(rank, device, group):
    """An odd number of them, so that the places that a replay takes are others than those of the one before."""
    summed = [torch.ones(count, device=device) for count in (9000, 100, 300_000)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for x in summed:
            all_reduce.all_reduce_(x, group)
    for replays in range(1, 8):
        graph.replay()
        alone = torch.full((5000,), float(rank), device=device)
        all_reduce.all_reduce_(alone, group)
        assert (alone == 1).all()
        for x in summed:
            assert (x == 2**replays).all()


def check_compiled_sums(rank, device, group):
    def doubled(x):
        total = 2 * x
        all_reduce.all_reduce_(total, group)
        return total + 1

    x = torch.arange(300.0, device=device) + rank
    with torch.no_grad():
        out = torch.compile(doubled, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(out, 4 * torch.arange(300.0, device=device) + 3)
    torch.library.opcheck(torch.ops.qlinear.all_reduce_.default, (torch.ones(3, device=device), group.group_name))
