"""Objects with __dlpack__: plain ones around a tensor, and capsules made by hand that say what no framework would."""

import ctypes

import numpy as np


class Producer:
    """Knows DLPack 1.x and nothing else: no exchange API, no buffer protocol."""

    def __init__(self, inner):
        self.inner = inner

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        return self.inner.__dlpack__(max_version=max_version)

    def __dlpack_device__(self):
        return self.inner.__dlpack_device__()


class OldProducer:
    """From before DLPack 1.0: takes no max_version."""

    def __init__(self, inner):
        self.inner = inner

    def __dlpack__(self, stream=None):
        return self.inner.__dlpack__()


class Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("id", ctypes.c_int32))


class DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", Device),
        ("ndim", ctypes.c_int32),
        ("dtype", DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Managed(ctypes.Structure):
    _fields_ = (("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", DELETER))


class ManagedVersioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", DELETER),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    )


new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype = ctypes.py_object
new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


class HandMade:
    """A capsule whose every field can be said; `deleted` counts the calls of its deleter."""

    def __init__(
        self,
        array=None,
        *,
        shape=None,
        strides=None,
        dtype=(0, 8, 1),
        device=(1, 0),
        data=None,
        byte_offset=0,
        ndim=None,
        versioned=True,
        version=(1, 0),
        flags=0,
        deleter=True,
        name=None,
    ):
        self.array = np.zeros((64, 2), np.int8) if array is None else array
        shape = self.array.shape if shape is None else shape
        self.deleted = 0
        self.shape = (ctypes.c_int64 * max(len(shape), 1))(*shape)
        self.strides = None if strides is None else (ctypes.c_int64 * len(strides))(*strides)
        self.managed = ManagedVersioned() if versioned else Managed()
        if versioned:
            self.managed.major, self.managed.minor = version
            self.managed.flags = flags
        self.deleter = DELETER(self.delete)
        if deleter:
            self.managed.deleter = self.deleter
        tensor = self.managed.tensor
        tensor.data = self.array.ctypes.data if data is None else data
        tensor.device = Device(*device)
        tensor.ndim = len(shape) if ndim is None else ndim
        tensor.dtype = DataType(*dtype)
        tensor.shape = self.shape
        if self.strides is not None:
            tensor.strides = self.strides
        tensor.byte_offset = byte_offset
        self.name = name or (b"dltensor_versioned" if versioned else b"dltensor")

    def delete(self, _):
        self.deleted += 1

    def __dlpack__(self, **_):
        return new_capsule(ctypes.addressof(self.managed), self.name, None)
