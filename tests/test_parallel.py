"""Layers split over 2 and 4 processes on the CPU, with gloo: one start of four processes runs every check."""

import json

import parallel_ranks
import pytest
import torch
import torch.distributed as dist
from processes import spawn
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

import qlinear
from qlinear import parallel
from qlinear.sharding import Step

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    directory = tmp_path_factory.mktemp("parallel")
    parallel_ranks.write_files(directory)
    spawn(parallel_ranks.run, directory, world=parallel_ranks.WORLD)
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(parallel_ranks.WORLD)]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", parallel_ranks.names())
def test_in_processes(outcomes, name, size):
    for rank in range(size):
        found = outcomes[rank].get(f"{name}-{size}", "not run: a check before it failed")
        assert not found, f"process {rank}: {found}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that torch can use")
def test_on_gpus():
    is_two = torch.cuda.device_count() > 1
    spawn(parallel_ranks.run_on_gpus, is_two, world=2, backend="nccl" if is_two else "gloo")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that torch can use")
@pytest.mark.parametrize("world", [2, 4])
def test_sums_on_gpus(world):
    """Processes that share a GPU take turns on it."""
    spawn(
        parallel_ranks.sum_on_gpus, world, world=world, backend="nccl" if torch.cuda.device_count() >= world else "gloo"
    )


# Where the parts begin


def task(name, size, axis="column", least=1, wish=1, reason="its reason", is_inner=True):
    return parallel._Task(name, nn.Identity(), parallel._Style(axis, is_inner), size, Step(least, wish, reason))


def bounds(tasks, parts, model=None):
    if model is None:
        model = nn.Module()
        model.mlp = nn.Module()
    for made in parallel._classes(model, tasks):
        parallel._set_bounds(made, parts)
    return [task.bounds for task in tasks]


def test_parts_are_even_where_they_can_be():
    assert bounds([task("mlp.a", 96)], 4) == [[0, 24, 48, 72, 96]]
    assert bounds([task("mlp.a", 10)], 4) == [[0, 3, 6, 8, 10]]


def test_layers_that_meet_are_split_alike_at_steps_of_both():
    up, down = task("mlp.up", 96, least=8), task("mlp.down", 96, "row", least=12)
    assert bounds([up, down], 2) == [[0, 48, 96]] * 2
    up, down = task("mlp.up", 120, least=8), task("mlp.down", 120, "row", least=12)
    assert bounds([up, down], 2) == [[0, 72, 120]] * 2


def test_what_is_gathered_is_split_by_itself():
    up, head = task("mlp.up", 96, least=32), task("head", 96, is_inner=False)
    assert bounds([up, head], 2) == [[0, 64, 96], [0, 48, 96]]


def test_wishes_count_where_they_cost_little():
    assert bounds([task("mlp.a", 11008, wish=128)], 4) == [[0, 2816, 5632, 8320, 11008]]
    assert bounds([task("mlp.a", 384, wish=128)], 2) == [[0, 192, 384]]


def attention(q, kv, o, head_dim):
    model = nn.Module()
    model.attention = nn.Module()
    model.attention.head_dim = head_dim
    return model, [task("attention.q", q), task("attention.k", kv), task("attention.o", o, "row")]


def test_heads_are_shared_out_whole():
    model, tasks = attention(12 * 8, 6 * 8, 12 * 8, 8)
    q, k, o = bounds(tasks, 4, model)
    assert k == [0, 16, 32, 40, 48]
    assert q == o == [0, 32, 64, 80, 96]


def test_heads_and_steps_together():
    model, tasks = attention(16 * 8, 8 * 8, 16 * 8, 8)
    tasks[2].step = Step(64, 64, "a block has 64 inputs")
    assert bounds(tasks, 2, model) == [[0, 64, 128], [0, 32, 64], [0, 64, 128]]
    with pytest.raises(ValueError, match=r"attention.o: 128 inputs .* 4 parts \(a block has 64 inputs; .* 8 heads"):
        bounds(tasks, 4, model)


def test_a_refusal_says_what_would_work():
    message = (
        r"mlp.a: 128 inputs cannot be split exactly into 4 parts \(its reason\): into 2 at most; 4 parts would need "
    )
    with pytest.raises(ValueError, match=message + r"at least 193, and are equal at multiples of 256"):
        bounds([task("mlp.a", 128, "row", least=64)], 4)


# The mesh


@pytest.fixture
def second_of_two():
    """This process, as if there were another."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("second_of_two")
def test_a_process_that_is_not_of_the_mesh_says_so():
    model = nn.Sequential(nn.Linear(8, 8))
    before = model[0]
    with pytest.raises(ValueError, match="device_mesh must have the process that calls, rank 1"):
        qlinear.parallelize(model, DeviceMesh("cpu", [0]), {"0": "colwise"})
    with pytest.raises(TypeError, match="device_mesh must be a DeviceMesh, got NoneType"):
        qlinear.parallelize(model, None, {"0": "colwise"})
    assert model[0] is before


# The plan


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 8), "down": nn.Linear(8, 4)}) for _ in range(2))
        self.norm = nn.LayerNorm(4)


def styles(plan, model=None):
    return parallel._styles(model or Model(), plan)


def test_a_star_is_one_name():
    found = styles({"layers.*.up": "colwise", "layers.1.down": "rowwise"})
    assert {name: style.axis for name, style in found.items()} == {
        "layers.0.up": "column",
        "layers.1.up": "column",
        "layers.1.down": "row",
    }


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        ({"layers.*.upp": "colwise"}, ValueError, "no module is called layers.*.upp"),
        ({"*.up": "colwise"}, ValueError, "no module"),
        ({"norm": "sequence_parallel"}, NotImplementedError, "norm: sequence_parallel is none of colwise, "),
        ({"norm.weight": "colwise"}, NotImplementedError, "norm.weight is a parameter of no linear layer"),
        (None, ValueError, "Model has no tensor-parallel plan"),
        (["norm"], TypeError, r"plan must map names of modules to styles, got \['norm'\]"),
        ({0: "colwise"}, TypeError, "plan must map names of modules to styles, got {0: 'colwise'}"),
    ],
)
def test_plans_that_cannot_be(plan, error, message):
    with pytest.raises(error, match=message):
        styles(plan)


def test_a_models_own_plan_may_name_what_it_lacks():
    model = Model()
    model.config = type("Config", (), {"base_model_tp_plan": {"layers.*.up": "colwise", "layers.*.qkv": "colwise"}})()
    assert list(styles(None, model)) == ["layers.0.up", "layers.1.up"]


def tasks_of(model, plan):
    report = qlinear.Report()
    return parallel._tasks(model, styles(plan, model), report), report.skipped


def test_what_cannot_be_split_stays_whole_between_whole_layers_only():
    model = Model()
    model.head = nn.Linear(4, 8)
    model.embed = nn.Embedding(8, 4)
    model.head.weight = model.embed.weight
    found, skipped = tasks_of(model, {"head": "colwise_gather_output", "embed": "embedding_rowwise"})
    assert found == []
    assert skipped == [
        ("head", "stays whole: its weight is tied to another module's"),
        ("embed", "stays whole, by the plan"),
    ]
    with pytest.raises(ValueError, match="head: cannot be split: its weight is tied"):
        tasks_of(model, {"head": "colwise"})
    with pytest.raises(ValueError, match="norm: cannot be split: LayerNorm is no linear layer"):
        tasks_of(model, {"norm": "rowwise"})
    model.layers[0]["up"].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="has hooks"):
        tasks_of(model, {"layers.*.up": "colwise"})


def test_the_format_says_why_its_inputs_cannot_be_split():
    model = Model()
    model.head = qlinear.Linear4bit(torch.randn(8, 100), None, "nf4")
    with pytest.raises(ValueError, match="head: Linear4bit: its blocks of 64 run on"):
        tasks_of(model, {"head": "rowwise"})


def test_one_module_has_one_style():
    model = Model()
    model.layers[1]["up"] = model.layers[0]["up"]
    assert len(tasks_of(model, {"layers.*.up": "colwise"})[0]) == 1
    with pytest.raises(ValueError, match=r"layers.1.up and layers.0.up are one module"):
        tasks_of(model, {"layers.0.up": "colwise", "layers.1.up": "rowwise"})


def test_only_a_mesh_will_do():
    with pytest.raises(TypeError, match="must be a DeviceMesh, got int"):
        qlinear.parallelize(Model(), 2)
