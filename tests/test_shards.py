"""The safetensors files of a directory: what is read of good ones, and how each kind of broken one is refused."""

import copy
import json
import os
import pickle
import struct

import pytest
import torch
from checkpoint_files import safetensors_bytes, write_directory

from qlinear.shards import Shards

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b.weight": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "c": torch.arange(4, dtype=torch.int8),
}


def says(**changes):
    return lambda header, data: ({"a": header["a"] | changes}, data)


def both(header, data):
    return {"a": header["a"], "b": header["a"]}, data


def hole(header, data):
    return {"a": header["a"] | {"data_offsets": [3, 7]}}, data + b"xyz"


def twice(header, data):
    entry = json.dumps(header["a"])
    return f'{{"a": {entry}, "a": {entry}}}'.encode(), data


def many_and_one_twice(header, data):
    """As many as make a search for each of them among all take minutes."""
    names = [f'"{number}": 0' for number in range(100_000)]
    return "{{{}}}".format(", ".join([*names, '"z": 0', '"z": 0'])).encode(), data


def empty_and_huge(header, data):
    return {"a": {"dtype": "F32", "shape": [0, 2**62, 4], "data_offsets": [0, 0]}}, b""


def called(name):
    return lambda header, data: ({name: header["a"]}, data)


# (what it is, the file's bytes or what to change of a file with one tensor of four bytes, the error after the path)
BROKEN = [
    ("empty", b"", ": is cut short: 0 bytes, the size of the header takes 8"),
    ("cut in the size", b"\x08\x00\x00", ": is cut short: 3 bytes, the size of the header takes 8"),
    ("cut in the header", struct.pack("<Q", 100) + b"{}", ": is cut short: its header has 100 bytes, the file 10"),
    ("absurd header", struct.pack("<Q", 2**63) + b"{}", f": says that its header has {2**63} bytes, at most 100000000"),
    ("a pickle", pickle.dumps({"a": 1}), ": is a pickle, which could run anything when loaded, not safetensors"),
    ("torch's zip", b"PK\x03\x04" + bytes(60), ": is a pickle, which could run anything when loaded, not safetensors"),
    ("GGUF", b"GGUF" + bytes(60), ": is a GGUF file, not safetensors"),
    ("no JSON", lambda header, data: (b"{'a'", data), ": its header is not valid JSON: "),
    ("no text", lambda header, data: (b"\xff\xfe\xfd", data), ": its header is not valid JSON: "),
    ("deep JSON", lambda header, data: (b"[" * 100_000, data), ": its header is not valid JSON: "),
    ("a list", lambda header, data: (b"[]", data), ": its header must be a JSON object, got list"),
    ("doubled among many", many_and_one_twice, ": its header is not valid JSON: 'z' stands in it twice"),
    ("doubled name", twice, ": its header is not valid JSON: 'a' stands in it twice"),
    ("no fields", lambda header, data: ({"a": {"dtype": "I8"}}, data), ": tensor 'a': must have dtype, shape and data"),
    ("a number", lambda header, data: ({"a": 3}, data), ": tensor 'a': must have dtype, shape and data_offsets, got 3"),
    ("control", called("a\x1b[2J"), r": tensor 'a\\x1b\[2J': its name has characters that cannot be printed"),
    ("surrogate", called("a\ud800"), r": tensor 'a\\ud800': its name has characters that cannot be printed"),
    ("dtype", says(dtype="I4"), ": tensor 'a': dtype must be one of F64, .*, got 'I4'"),
    ("no dtype", says(dtype=["I8"]), r": tensor 'a': dtype must be one of F64, .*, got \['I8'\]"),
    ("shape", says(shape=4), ": tensor 'a': shape must be a list of sizes, got 4"),
    ("negative", says(shape=[-2, -2]), r": tensor 'a': shape must be a list of sizes, got \[-2, -2\]"),
    ("true", says(shape=[True, 4]), r": tensor 'a': shape must be a list of sizes, got \[True, 4\]"),
    ("fraction", says(shape=[4.0]), r": tensor 'a': shape must be a list of sizes, got \[4.0\]"),
    ("longer than any", says(shape=[2**63]), rf": tensor 'a': shape must be a list of sizes, got \[{2**63}\]"),
    ("digits", says(shape=[10**4000] * 2), ": tensor 'a': shape must be a list of sizes, got "),
    # Their product alone would take minutes.
    ("dimensions", says(shape=[2**62] * 100_000), ": tensor 'a': shape must have at most 64 dimensions, has 100000"),
    ("empty and huge", empty_and_huge, rf": tensor 'a': shape \[0, {2**62}, 4\] is larger than an empty tensor's may"),
    ("huge", says(shape=[2**40, 2**40]), rf": tensor 'a': I8 \[{2**40}, {2**40}\] takes {2**80} bytes"),
    ("lying shape", says(shape=[5]), r": tensor 'a': I8 \[5\] takes 5 bytes, data_offsets give it 4"),
    ("wider dtype", says(dtype="I16"), r": tensor 'a': I16 \[4\] takes 8 bytes, data_offsets give it 4"),
    ("offsets", says(data_offsets=[0]), r": tensor 'a': data_offsets must be two sizes, got \[0\]"),
    ("backwards", says(data_offsets=[4, 0]), r": tensor 'a': data_offsets \[4, 0\] lie outside the 4 bytes of data"),
    ("outside", says(data_offsets=[4, 8]), r": tensor 'a': data_offsets \[4, 8\] lie outside the 4 bytes of data"),
    ("before", says(data_offsets=[-4, 0]), r": tensor 'a': data_offsets must be two sizes, got \[-4, 0\]"),
    ("cut in the data", lambda header, data: (header, data[:2]), r": tensor 'a': data_offsets \[0, 4\] lie outside"),
    ("overlap", both, ": tensors 'a' and 'b' overlap"),
    ("a tail", lambda header, data: (header, data + b"xy"), ": 2 bytes after its last tensor belong to no tensor"),
    ("a hole", hole, ": 3 bytes before tensor 'a' belong to no tensor"),
]  # fmt: skip


@pytest.mark.parametrize(("broken", "error"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_a_broken_file_is_refused_by_name(tmp_path, broken, error):
    if not isinstance(broken, bytes):
        broken = safetensors_bytes({"a": torch.arange(4, dtype=torch.int8)}, change=broken)
    (tmp_path / "model.safetensors").write_bytes(broken)
    with pytest.raises(ValueError, match=rf"model\.safetensors{error}"):
        Shards(tmp_path)


@pytest.mark.parametrize("files", [1, 2, 3])
def test_tensors_are_read_as_they_are(tmp_path, files):
    shards = Shards(write_directory(tmp_path, TENSORS, files=files))
    assert set(shards) == set(TENSORS)
    assert len(shards.paths) == files
    for name, tensor in TENSORS.items():
        assert shards[name].shape == tensor.shape
        assert shards[name].nbytes == tensor.nbytes
        assert shards.tensor(name).dtype == tensor.dtype
        assert torch.equal(shards.tensor(name), tensor)


def test_a_tensor_may_lie_off_its_alignment_and_be_empty(tmp_path):
    tensors = {"odd": torch.ones(3, dtype=torch.uint8), "none": torch.empty(0, 4), "wide": torch.tensor([1.0, 2.0])}
    shards = Shards(write_directory(tmp_path, tensors))
    for name, tensor in tensors.items():
        assert torch.equal(shards.tensor(name), tensor)
    assert shards.tensor("wide").data_ptr() % 4 == 0


def test_a_tensor_is_mapped_alone_and_never_written_back(tmp_path):
    shards = Shards(write_directory(tmp_path, TENSORS))
    before = shards.paths[0].read_bytes()
    tensor = shards.tensor("a")
    assert tensor.data_ptr() == shards.tensor("a").data_ptr()
    assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert copy.deepcopy(tensor).untyped_storage().nbytes() == tensor.nbytes
    tensor.fill_(7.0)
    assert shards.paths[0].read_bytes() == before
    del shards
    assert tensor.sum() == 42.0


def test_a_file_that_becomes_shorter_is_refused(tmp_path):
    """A page of a mapping beyond the end of its file would end the process."""
    shards = Shards(write_directory(tmp_path, TENSORS))
    whole = shards.paths[0].read_bytes()
    shards.paths[0].write_bytes(whole[:-1])
    for name in TENSORS:
        with pytest.raises(ValueError, match=r"model\.safetensors: became shorter while it was read"):
            shards.tensor(name)
    shards.paths[0].write_bytes(whole)
    assert torch.equal(shards.tensor("a"), TENSORS["a"])


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    refused(tmp_path, r"model\.safetensors: is not a regular file")


def test_a_link_is_followed(tmp_path):
    write_directory(tmp_path / "blobs", TENSORS)
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs" / "model.safetensors")
    assert set(Shards(tmp_path)) == set(TENSORS)
    (tmp_path / "blobs" / "model.safetensors").unlink()
    refused(tmp_path, r"model\.safetensors: cannot be read: No such file or directory")


def test_an_index_of_absurd_size_is_not_read(tmp_path):
    write_directory(tmp_path, TENSORS, files=2)
    with (tmp_path / "model.safetensors.index.json").open("r+b") as index:
        index.truncate(10**12)
    refused(tmp_path, "index.json: has 1000000000000 bytes, of the index at most 100000000 are read")


def test_a_scalar(tmp_path):
    scalar = Shards(write_directory(tmp_path, {"s": torch.tensor(2.5)})).tensor("s")
    assert scalar.shape == ()
    assert scalar == 2.5


def test_a_file_of_another_name(tmp_path):
    write_directory(tmp_path, TENSORS)
    (tmp_path / "model.safetensors").rename(tmp_path / "gptq_model-4bit-128g.safetensors")
    assert set(Shards(tmp_path)) == set(TENSORS)
    (tmp_path / "other.safetensors").write_bytes(safetensors_bytes(TENSORS))
    with pytest.raises(ValueError, match="has gptq_model-4bit-128g.safetensors, other.safetensors: none is model"):
        Shards(tmp_path)


def refused(directory, error):
    with pytest.raises(ValueError, match=error):
        Shards(directory)


def test_directories_without_a_checkpoint(tmp_path):
    refused(tmp_path / "absent", "absent: is not a directory")
    refused(tmp_path, "has no safetensors file")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused(tmp_path, r"pytorch_model.bin: is a pickle, which could run anything when loaded")


def test_broken_indices(tmp_path):
    write_directory(tmp_path, TENSORS, files=2)
    index = tmp_path / "model.safetensors.index.json"
    first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    good = json.loads(index.read_text())["weight_map"]

    def written(text):
        index.write_text(text if isinstance(text, str) else json.dumps({"weight_map": text}))

    written(good | {"d": first})
    refused(tmp_path, f"{first}: lacks tensor 'd', which the index has in it")
    written(good | {"a": second})
    refused(tmp_path, f"{second}: lacks tensor 'a', which the index has in it")
    written(good | {"a": "../" + first})
    refused(tmp_path, "index.json: tensor 'a': '../model-00001-of-00002.safetensors' is not the name of a file in the")
    written(good | {"a": ".."})
    refused(tmp_path, "index.json: tensor 'a': '..' is not the name of a file in the directory")
    written(good | {"a": "third.safetensors"})
    refused(tmp_path, "third.safetensors: is absent, model.safetensors.index.json names it for 'a'")
    written(good | {"a": 3})
    refused(tmp_path, "index.json: weight_map must map names of tensors to names of files")
    written({})
    refused(tmp_path, "index.json: weight_map must map names of tensors to names of files")
    written("{")
    refused(tmp_path, "index.json: the index is not valid JSON")
    written(good)
    (tmp_path / second).write_bytes(safetensors_bytes(TENSORS))
    refused(tmp_path, f"tensor 'a' is in two files, .*{first} and .*{second}")


@pytest.mark.parametrize("size", [0x280, 0x380, 0x480, 0x580])
def test_a_header_whose_size_begins_as_a_pickle_does(tmp_path, size):
    def padded(header, data):
        text = json.dumps(header).encode()
        return text + b" " * (size - len(text)), data

    content = safetensors_bytes(TENSORS, change=padded)
    assert content[:2] == struct.pack("<H", size)
    (tmp_path / "model.safetensors").write_bytes(content)
    assert set(Shards(tmp_path)) == set(TENSORS)
