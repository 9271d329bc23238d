"""transformers: from_pretrained makes a model of its classes with our layers; register lets its own from_pretrained.

transformers and huggingface_hub are imported when they are first needed; nothing else here needs them.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoint import load_shards
from .shards import Shards

_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# What a checkpoint needs; its other files (pickles, other frameworks' weights) stay where they are.
_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "from_pretrained makes a transformers model: pip install transformers, or give a model of your own to "
            "qlinear.load_checkpoint"
        ) from error
    return transformers


def _directory(directory_or_id: str | os.PathLike) -> Path:
    """The directory of a checkpoint, downloaded where an id is given."""
    path = Path(directory_or_id)
    if path.is_dir():
        return path
    name = os.fspath(directory_or_id)
    if not _ID.fullmatch(name) or path.exists():
        raise ValueError(f"{name}: is neither a directory nor the id of a model")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        text = f"{name}: is no directory, and to download an id takes huggingface_hub: pip install it"
        raise ImportError(text) from error
    return Path(snapshot_download(name, allow_patterns=list(_PATTERNS)))


def _model_class(transformers: Any, config: Any, directory: Path) -> type:
    """The class that the checkpoint was saved from, else the one that AutoModel takes."""
    named = getattr(config, "architectures", None) or []
    for name in named:
        if isinstance(found := getattr(transformers, name, None), type):
            return found
    if getattr(config, "auto_map", None):
        raise ValueError(
            f"{directory}: {', '.join(named) or 'its model'} is code of its own: make the model, then load_checkpoint"
        )
    known = transformers.AutoModel._model_mapping
    if type(config) not in known:
        raise ValueError(f"{directory}: transformers {transformers.__version__} has no {', '.join(named) or 'model'}")
    return known[type(config)]


_patching = threading.Lock()


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters that this thread's modules register lose their memory at once; buffers are computed as ever: those
    that no file has, as rotary frequencies, could not be made up for later."""
    register, thread = nn.Module.register_parameter, threading.get_ident()

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        # One that is there already is tied: it stays who it is.
        if threading.get_ident() == thread and param is not None and not param.is_meta:
            made = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
            made.__dict__.update(param.__dict__)
            module._parameters[name] = made

    with _patching:
        nn.Module.register_parameter = register_on_meta
        try:
            yield
        finally:
            nn.Module.register_parameter = register


def renaming(model: nn.Module) -> Callable[[str], str]:
    """From the names of a checkpoint's tensors to the model's: as transformers renames those of older files, with the
    base model's prefix where only one of the two has it."""
    modules = {name for name, _ in model.named_modules()}
    tensors = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    base = f"{getattr(model, 'base_model_prefix', '')}."
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        rules = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    except ImportError:
        rules = []

    def is_known(name: str) -> bool:
        return name in tensors or any(name[:at] in modules for at, letter in enumerate(name) if letter == "." and at)

    def rename(name: str) -> str:
        new = name
        for rule in rules:
            new = rule.rename_source_key(new)[0]
        candidates = (name, new, *((f"{base}{new}", new.removeprefix(base)) if len(base) > 1 else ()))
        return next((candidate for candidate in candidates if is_known(candidate)), name)

    return rename


def model_on_meta(directory: Path, dtype: torch.dtype | None = None) -> Any:
    """The model of a directory's config.json, in eval mode, its parameters on the meta device."""
    transformers = _transformers()
    config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    kind = _model_class(transformers, config, directory)
    with _parameters_on_meta():
        return kind._from_config(config, **({} if dtype is None else {"dtype": dtype})).eval()


def from_pretrained(
    directory_or_id: str | os.PathLike,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    skip: Iterable[str] = (),
    *,
    progress: bool | None = None,
) -> Any:
    """A transformers model of a quantized checkpoint, in eval mode, its quantized layers being ours.

    The model is of the class that config.json names, made without memory for its parameters; then load_checkpoint:
    dtype, device (None is the CPU), skip and progress are as there. An id is downloaded by huggingface_hub. ImportError
    where transformers or huggingface_hub is needed and absent.
    """
    transformers = _transformers()
    directory = _directory(directory_or_id)
    shards = Shards(directory)
    model = model_on_meta(directory, dtype)
    load_shards(
        model, shards.renamed(renaming(model)), device=device or "cpu", dtype=dtype, skip=skip, progress=progress
    )
    if hasattr(model, "generation_config") and (directory / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(directory, local_files_only=True)
    return model


_replaced: dict[int, tuple[dict, dict]] = {}


def register() -> None:
    """From now on transformers' AutoModel*.from_pretrained builds our layers: for checkpoints of every method that
    load_checkpoint knows, and, given a BitsAndBytesConfig, an EetqConfig or an FbgemmFp8Config, by quantizing."""
    _transformers()
    from .hf_quantizer import entries

    for mapping, ours in entries():
        if id(mapping) not in _replaced:
            _replaced[id(mapping)] = (mapping, {name: mapping.get(name) for name in ours})
        mapping.update(ours)


def unregister() -> None:
    """Puts transformers' own classes back."""
    for mapping, before in _replaced.values():
        for name, kind in before.items():
            if kind is None:
                mapping.pop(name, None)
            else:
                mapping[name] = kind
    _replaced.clear()
