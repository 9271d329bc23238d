"""parallelize: a model's linear layers split over the processes of a device mesh (tensor parallelism).

A column-parallel layer has some of the outputs, a row-parallel one some of the inputs, and the products of all
processes are summed. Parts are exact (sharding.py). Layers whose parts meet, as those before and after an activation,
are split at the same places, those of attention between heads: there a model must take its number of heads from the
shapes it sees.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from . import all_reduce, sharding
from .layers._module import QuantizedLinear
from .model import Bar, Report, owners, swap, weights_of_attention
from .sharding import Step


class _Style(NamedTuple):
    """axis: "column", "row" or "", which stays whole. is_inner: its parts meet those of other layers; where not, a
    column-parallel layer gathers its outputs, and a row-parallel one splits an input that every process has."""

    axis: str
    is_inner: bool = True
    sums_gradients: bool = False


# By the names that transformers' plans give them.
_STYLES = {
    "colwise": _Style("column"),
    "colwise_gather_output": _Style("column", is_inner=False),
    "colwise_rep": _Style("column", is_inner=False),
    "rowwise": _Style("row"),
    "rowwise_split_input": _Style("row", is_inner=False),
    "rowwise_rep": _Style("row", is_inner=False),
    "replicate": _Style(""),
    "embedding_rowwise": _Style(""),
    "embedding_colwise": _Style(""),
    "replicated_with_grad_allreduce": _Style("", sums_gradients=True),
}
# Attributes of attention modules that tell the size of a head.
_HEAD_SIZES = ("head_dim", "attention_head_size")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# A part may be larger by this for the sake of the kernels' tiles and groups.
_UNEVEN = 1.1


@dataclass
class _Task:
    """A layer to split: size is the length of what is split, bounds where."""

    name: str
    module: nn.Module
    style: _Style
    size: int
    step: Step
    bounds: list[int] = field(default_factory=list)


@dataclass
class _Class:
    """Layers that are split at the same places, in `units` parts at most: heads, or channels."""

    tasks: list[_Task]
    units: int


# The plan


def _plan_of(model: nn.Module) -> dict[str, str]:
    plan = getattr(model, "tp_plan", None) or getattr(model, "_tp_plan", None)
    if plan:
        return dict(plan)
    plan = getattr(getattr(model, "config", None), "base_model_tp_plan", None)
    if not plan:
        raise ValueError(f"{type(model).__name__} has no tensor-parallel plan of its own: give one")
    prefix = getattr(model, "base_model_prefix", "")
    inner = f"{prefix}." if prefix and hasattr(model, prefix) else ""
    return {f"{inner}{name}": style for name, style in plan.items()}


def _matches(pattern: str, names: Mapping[str, Any]) -> list[str]:
    """A * stands for what is between two dots."""
    expression = re.compile(r"[^.]+".join(map(re.escape, pattern.split("*"))))
    return [name for name in names if expression.fullmatch(name)]


def _styles(model: nn.Module, plan: Mapping[str, str] | None) -> dict[str, _Style]:
    """The style of each module of the plan that the model has."""
    if plan is not None and not (isinstance(plan, Mapping) and all(isinstance(name, str) for name in plan)):
        raise TypeError(f"plan must map names of modules to styles, got {plan!r:.100}")
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found: dict[str, _Style] = {}
    for pattern, name in (_plan_of(model) if plan is None else plan).items():
        places = _matches(pattern, modules)
        held = [] if places else _matches(pattern, parameters)
        if plan is not None and not places and not held:
            raise ValueError(f"plan: no module is called {pattern}")
        if (places or held) and name not in _STYLES:
            raise NotImplementedError(f"plan: {pattern}: {name} is none of {', '.join(_STYLES)}")
        if held and _STYLES[name].axis:
            raise NotImplementedError(f"plan: {held[0]} is a parameter of no linear layer, it cannot be split")
        found |= dict.fromkeys(places, _STYLES.get(name))
    return found


def _obstacle(module: nn.Module, shared: set[int], reserved: dict[int, str]) -> str:
    """Why a module cannot be split; an empty string where it can."""
    if not sharding.can_split(module):
        return f"{type(module).__name__} is no linear layer that can be split"
    if nn.utils.parametrize.is_parametrized(module):
        return "its parameters are parametrized"
    if any(vars(module).get(key) for key in _HOOKS):
        return "it has hooks, which its part would lose"
    if any(id(parameter) in shared for parameter in module.parameters()):
        return "its weight is tied to another module's"
    return reserved.get(id(module), "")


def _tasks(model: nn.Module, styles: Mapping[str, _Style], report: Report) -> list[_Task]:
    names, shared = owners(model)
    reserved = weights_of_attention(model.modules())
    tasks: dict[int, _Task] = {}
    for name, style in styles.items():
        module = model.get_submodule(name)
        if not style.axis:
            report.skipped.append((name, "stays whole, by the plan"))
            continue
        obstacle = _obstacle(module, shared, reserved) if name else "it is the model itself"
        if obstacle and not style.is_inner:
            report.skipped.append((name, f"stays whole: {obstacle}"))
            continue
        if obstacle:
            raise ValueError(f"{name}: cannot be split: {obstacle}")
        if id(module) in tasks:
            if tasks[id(module)].style != style:
                raise ValueError(f"{name} and {names[id(module)][0]} are one module, with two styles in the plan")
            continue
        is_row = style.axis == "row"
        try:
            step = (sharding.row_step if is_row else sharding.column_step)(module)
        except ValueError as error:
            raise ValueError(f"{name}: {type(module).__name__}: {error}") from None
        tasks[id(module)] = _Task(name, module, style, module.in_features if is_row else module.out_features, step)
    return list(tasks.values())


# Where the parts begin


def _heads(model: nn.Module, tasks: list[_Task]) -> dict[str, list[tuple[_Task, int]]]:
    """By the name of their attention module, its layers and how many heads each has."""
    found: dict[str, list[tuple[_Task, int]]] = {}
    for task in tasks:
        parent = task.name.rpartition(".")[0]
        module = model.get_submodule(parent)
        size = next((size for key in _HEAD_SIZES if type(size := getattr(module, key, None)) is int and size > 0), 0)
        if size and task.size % size == 0:
            found.setdefault(parent, []).append((task, task.size // size))
    return found


def _classes(model: nn.Module, tasks: list[_Task]) -> list[_Class]:
    """Inner layers of the same size are split alike, and so are those of one attention module, by the heads that the
    one with the fewest has; a layer whose parts meet no others is split by itself."""
    inner = [task for task in tasks if task.style.is_inner]
    of_size: dict[int, _Class] = {}
    for task in inner:
        of_size.setdefault(task.size, _Class([], task.size)).tasks.append(task)
    for layers in _heads(model, inner).values():
        first = of_size[layers[0][0].size]
        units = math.gcd(*(heads for _, heads in layers))
        for task, _ in layers:
            other = of_size[task.size]
            if other is not first:
                first.tasks += other.tasks
                units = math.gcd(units, other.units)
                for size in {task.size for task in other.tasks}:
                    of_size[size] = first
        first.units = math.gcd(first.units, units)
    found = list({id(made): made for made in of_size.values()}.values())
    return found + [_Class([task], task.size) for task in tasks if not task.style.is_inner]


def _chunk(made: _Class, steps: dict[str, int]) -> int:
    """The least number of units that are whole steps of every layer."""
    return math.lcm(*(steps[t.name] // math.gcd(steps[t.name], t.size // made.units) for t in made.tasks))


def _ceil(count: int, size: int) -> int:
    return -(-count // size)


def _largest(units: int, chunk: int, parts: int) -> int:
    return _ceil(_ceil(units, chunk), parts) * chunk


def _refusal(made: _Class, parts: int) -> ValueError:
    chunks = {task.name: _chunk(_Class([task], made.units), {task.name: task.step.least}) for task in made.tasks}
    task = max(made.tasks, key=lambda task: chunks[task.name])
    unit = task.size // made.units
    what = "inputs" if task.style.axis == "row" else "outputs"
    most = _ceil(made.units, _chunk(made, {task.name: task.step.least for task in made.tasks}))
    reasons = [task.step.reason] if chunks[task.name] > 1 else []
    if unit > 1:
        reasons.append(f"its attention has {made.units} heads to share out, of {unit} {what} each here")
    why = f" ({'; '.join(reasons)})" if reasons else ""
    step = math.lcm(unit, task.step.least)
    return ValueError(
        f"{task.name}: {task.size} {what} cannot be split exactly into {parts} parts{why}: into {most} at most; "
        f"{parts} parts would need at least {(parts - 1) * step + 1}, and are equal at multiples of {parts * step}"
    )


def _set_bounds(made: _Class, parts: int) -> None:
    """parts + 1 bounds for each layer: as even as the steps allow, at the kernels' steps where that costs little."""
    chunk = _chunk(made, {task.name: task.step.least for task in made.tasks})
    if _ceil(made.units, chunk) < parts:
        raise _refusal(made, parts)
    wish = math.lcm(chunk, _chunk(made, {task.name: task.step.wish for task in made.tasks}))
    if _ceil(made.units, wish) >= parts and _largest(made.units, wish, parts) <= _UNEVEN * _largest(
        made.units, chunk, parts
    ):
        chunk = wish
    share, more = divmod(_ceil(made.units, chunk), parts)
    at = [min(made.units, (rank * share + min(rank, more)) * chunk) for rank in range(parts + 1)]
    for task in made.tasks:
        task.bounds = [place * (task.size // made.units) for place in at]


# What the processes say to each other


def _gathered(part: Tensor, bounds: list[int], group: dist.ProcessGroup) -> Tensor:
    """Parts of the last dimension put together; they travel at the size of the largest."""
    sizes = [end - begin for begin, end in itertools.pairwise(bounds)]
    largest = max(sizes)
    sent = part.contiguous() if part.shape[-1] == largest else nn.functional.pad(part, (0, largest - part.shape[-1]))
    received = [torch.empty_like(sent) for _ in sizes]
    dist.all_gather(received, sent, group=group)
    return torch.cat([tensor[..., :size] for tensor, size in zip(received, sizes, strict=True)], -1)


def _summed(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = part.clone(memory_format=torch.contiguous_format)
    all_reduce.all_reduce_(total, group)
    return total


class _Copy(torch.autograd.Function):
    """x as it is; its gradient is the sum of all processes'."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return _summed(grad, ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        return _summed(x, group)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bounds, rank, group):
        ctx.place = (bounds[rank], bounds[rank + 1])
        return _gathered(x, bounds, group)

    @staticmethod
    def backward(ctx, grad):
        begin, end = ctx.place
        return grad[..., begin:end], None, None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bounds, rank, group):
        ctx.bounds, ctx.group = bounds, group
        return x[..., bounds[rank] : bounds[rank + 1]].contiguous()

    @staticmethod
    def backward(ctx, grad):
        return _gathered(grad, ctx.bounds, ctx.group), None, None, None


class _Hook:
    """A module's hook in one process of the group, which copies of the module share."""

    def __init__(self, task: _Task, rank: int, group: dist.ProcessGroup) -> None:
        self.bounds, self.rank, self.group = task.bounds, rank, group

    def __deepcopy__(self, memo: dict) -> _Hook:
        return self


# A linear layer has one argument, by whatever name it may be called.


class _BeforeColumns(_Hook):
    def __call__(self, module: nn.Module, args: tuple, named: dict[str, Tensor]) -> tuple[tuple, dict] | None:
        (x,) = (*args, *named.values())
        return ((_Copy.apply(x, self.group),), {}) if torch.is_grad_enabled() and x.requires_grad else None


class _AfterColumns(_Hook):
    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return _Gather.apply(output, self.bounds, self.rank, self.group)


class _BeforeRows(_Hook):
    def __call__(self, module: nn.Module, args: tuple, named: dict[str, Tensor]) -> tuple[tuple, dict]:
        (x,) = (*args, *named.values())
        return (_Split.apply(x, self.bounds, self.rank, self.group),), {}


class _AfterRows(_Hook):
    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        if output.requires_grad:
            return _Sum.apply(output, self.group)
        # A product is nobody else's yet.
        all_reduce.all_reduce_(output, self.group)
        return output


def _part(task: _Task, rank: int, group: dist.ProcessGroup, device: torch.device) -> nn.Module:
    begin, end = task.bounds[rank : rank + 2]
    if task.style.axis == "column":
        made = sharding.column_part(task.module, begin, end).to(device)
        made.register_forward_pre_hook(_BeforeColumns(task, rank, group), with_kwargs=True)
        if not task.style.is_inner:
            made.register_forward_hook(_AfterColumns(task, rank, group))
        return made
    made = sharding.row_part(task.module, begin, end, bias=rank == 0).to(device)
    if not task.style.is_inner:
        made.register_forward_pre_hook(_BeforeRows(task, rank, group), with_kwargs=True)
    made.register_forward_hook(_AfterRows(task, rank, group))
    return made


# The whole


def _check_loaded(model: nn.Module) -> None:
    for name, module in model.named_modules():
        # What is packed on a GPU has placeholders without data.
        if isinstance(module, QuantizedLinear) and module.device.type != "meta":
            continue
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.is_meta:
                raise ValueError(f"{name}.{key} is on the meta device: load the model first, on the CPU")


def _place(device_mesh: DeviceMesh) -> tuple[dist.ProcessGroup, int, int, torch.device]:
    """(the group, this process in it, how many there are, where its part of the model goes)."""
    if not isinstance(device_mesh, DeviceMesh):
        raise TypeError(f"device_mesh must be a DeviceMesh, got {type(device_mesh).__name__}")
    if device_mesh.ndim != 1:
        names = device_mesh.mesh_dim_names or ()
        raise ValueError(f"device_mesh must have one dimension, as mesh['tp'] has, got {device_mesh.ndim}: {names}")
    if device_mesh.get_coordinate() is None:
        raise ValueError(f"device_mesh must have the process that calls, rank {dist.get_rank()}: it is {device_mesh}")
    kind = device_mesh.device_type
    device = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
    return device_mesh.get_group(), device_mesh.get_local_rank(), device_mesh.size(), device


def parallelize(
    model: nn.Module,
    device_mesh: DeviceMesh,
    plan: Mapping[str, str] | None = None,
    *,
    progress: bool | None = None,
) -> Report:
    """Splits model's linear layers, quantized or not, over the processes of a one-dimensional mesh, in place: every
    process calls this with the same whole model and keeps its part of it, on the mesh's device.

    plan: names of modules, with * for what is between two dots, and "colwise", "rowwise", "colwise_gather_output" or
    "rowwise_split_input" for each (the last two between layers that are whole); None is the model's own, as
    transformers' models have one. After `load_checkpoint(model, directory)` on the CPU, which maps the files, a process
    reads from them no more than its own part of each layer, in whole pages (and its zeros, where they tell their own
    format; a storage that is converted when it is loaded, as AWQ's GEMV, is read whole).

    The weight of a part is the whole's, bit for bit. Sums of row-parallel layers are in the output's dtype, and the
    first process adds the bias. On GPUs of one host that can write into each other's memory, short sums are made by
    kernels of our own, long ones by the group's backend (`sums` of the report says up to where, or why not): those of a
    group run in the order in which they are launched, a graph's when it runs, and nothing may let two of them run at
    once. Where x is quantized by its tokens' absmax (LLM.int8(), FP8), a row-parallel part takes that of its own
    inputs: codes differ from one process', with errors no larger. Embeddings and what the plan does not name stay
    whole. ValueError says which layer cannot be split exactly, why, and at what size it could, before anything is
    changed. progress: as for replace_linear.
    """
    group, rank, parts, device = _place(device_mesh)
    _check_loaded(model)
    report = Report()
    styles = _styles(model, plan)
    tasks = _tasks(model, styles, report)
    for together in _classes(model, tasks):
        _set_bounds(together, parts)
    together = None
    if tasks and parts > 1 and device.type == "cuda":
        report.sums = all_reduce.connect(group, device)
    names, _ = owners(model)
    bar = Bar(len(tasks), "qlinear: parallelize", progress)
    try:
        while tasks:
            # Nothing here keeps the whole layer once its part stands in its place.
            task = tasks.pop(0)
            swap(model, task.name, names, _part(task, rank, group, device), report)
            del task
            bar.step()
    finally:
        bar.close()
    for name, style in styles.items():
        if style.sums_gradients:
            for parameter in model.get_submodule(name).parameters():
                if parameter.requires_grad:
                    parameter.register_hook(lambda grad: _summed(grad, group))
    model.to(device)
    return report
