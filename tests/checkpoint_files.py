"""Writes checkpoint directories byte by byte, with struct and json: nothing of the loader's is used."""

import json
import struct

import torch

CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip


def tensor_bytes(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def safetensors_bytes(tensors, metadata=None, change=None):
    """The bytes of a file with these tensors. change(header, data): another (header, data), header a dict or bytes."""
    header = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, tensor in tensors.items():
        piece = tensor_bytes(tensor)
        offsets = [len(data), len(data) + len(piece)]
        header[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += piece
    if change is not None:
        header, data = change(header, data)
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def write_directory(directory, tensors, config=None, *, files=1, change=None):
    """A directory with config.json's quantization_config and one file, or several with their index."""
    directory.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (directory / "config.json").write_text(json.dumps({"quantization_config": config}))
    if files == 1:
        (directory / "model.safetensors").write_bytes(safetensors_bytes(tensors, {"format": "pt"}, change))
        return directory
    names, index = list(tensors), {}
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        index |= dict.fromkeys(names[number::files], file)
        part = {name: tensors[name] for name in names[number::files]}
        (directory / file).write_bytes(safetensors_bytes(part, {"format": "pt"}))
    text = json.dumps({"metadata": {}, "weight_map": index})
    (directory / "model.safetensors.index.json").write_text(text)
    return directory
