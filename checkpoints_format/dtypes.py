"""The dtypes of format version 1: their names in the manifest, in NumPy and in a safetensors header.

A dtype that safetensors cannot name is stored there as U8, its true name in the manifest alone.
Every element is little-endian and takes whole bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import MappingProxyType

import ml_dtypes
import numpy as np

from .errors import FormatError

# manifest name -> name in a safetensors header
SAFETENSORS: Mapping[str, str] = MappingProxyType(
    {
        "bool": "BOOL",
        "uint8": "U8",
        "uint16": "U16",
        "uint32": "U32",
        "uint64": "U64",
        "int8": "I8",
        "int16": "I16",
        "int32": "I32",
        "int64": "I64",
        "float16": "F16",
        "float32": "F32",
        "float64": "F64",
        "bfloat16": "BF16",
        "float8_e4m3fn": "F8_E4M3",
        "float8_e5m2": "F8_E5M2",
        "float8_e8m0fnu": "U8",
        "float8_e4m3": "U8",
        "float8_e3m4": "U8",
        "float8_e4m3fnuz": "U8",
        "float8_e5m2fnuz": "U8",
        "float8_e4m3b11fnuz": "U8",
        "complex64": "U8",
        "complex128": "U8",
    }
)


def _numpy(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name)) if hasattr(ml_dtypes, name) else np.dtype(name)


NUMPY: Mapping[str, np.dtype] = MappingProxyType({name: _numpy(name) for name in SAFETENSORS})
_NAME_OF = {dtype: name for name, dtype in NUMPY.items()}


def item_bytes(name: str) -> int:
    """Return the bytes of one element of a dtype."""
    return NUMPY[name].itemsize


def check_dtype(name: object, *, what: str) -> str:
    """Return ``name`` if it is a dtype of the format. Raises FormatError, with the list of dtypes, if it is not."""
    if not isinstance(name, str) or name not in NUMPY:
        raise FormatError(
            what,
            expected=f"a dtype among {', '.join(NUMPY)}",
            got=repr(name)[:80],
            do="Cast the tensor to one of these before saving.",
        )
    return name


def dtype_name(array: np.ndarray | np.dtype, *, what: str = "array") -> str:
    """The manifest's name of a NumPy dtype.

    Raises:
        FormatError: no such dtype in the format (objects, strings, dates, 4-bit kinds).
    """
    dtype = array.dtype if isinstance(array, np.ndarray) else np.dtype(array)
    return check_dtype(_NAME_OF.get(dtype.newbyteorder("="), str(dtype)), what=what)


def as_words(array: np.ndarray) -> np.ndarray:
    """Return the same memory as unsigned words, so that NumPy copies bits without interpreting values."""
    kind = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}.get(array.dtype.itemsize)
    return array.view(kind) if kind else array


def little_endian(array: np.ndarray) -> np.ndarray:
    """Return ``array`` itself, or a byte-swapped copy if it is big-endian."""

    order = array.dtype.byteorder
    if order == ">" or (order == "=" and sys.byteorder == "big"):
        return array.byteswap().view(array.dtype.newbyteorder("<"))
    return array
