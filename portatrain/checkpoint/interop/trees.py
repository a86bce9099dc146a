"""Convert checkpoints of the frameworks: Orbax, torch's DCP, a plain state_dict, a plain nnx state.

orbax, dcp   the whole state, every tensor by its name; beside it portatrain.json, our meta, so that an import continues
             the same run
torch        model.pt: the state_dict of the lowered nn.Module ('blocks.0.attn.wq'); torch.load(weights_only=True)
nnx          state.msgpack: the pure dict of the lowered nnx module's state; flax.serialization.msgpack_restore

The state is held in memory while it is converted.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_format import Reader
from portatrain.checkpoint.meta import NEEDED, wrong
from portatrain.errors import UserError, of_reading
from portatrain.model.lora import FACTORS
from portatrain.model.module import Definition, Module, Param, Stack, State
from portatrain.system import json_files

META = "portatrain.json"
Tensors = dict[str, np.ndarray]


def tensors(reader: Reader, role: str | None = None) -> Tensors:
    """Return all tensors by name, or the tensors of one role by name without the role."""
    names = [n for n in reader.names if role is None or n.startswith(f"{role}/")]
    return {n if role is None else n.partition("/")[2]: reader.read(n) for n in names}


BASE = "base"
"""The name of a weight in a tree in which it has parts below it, as the weight beside its factors of LoRA has."""


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turn 'a/b' into {'a': {'b': ..}}. If there is 'a/b/c' too, 'a/b' becomes {'a': {'b': {'base': ..}}}."""
    tree: dict[str, Any] = {}
    folders_of = {"/".join(parts[:n]) for name in flat for parts in [name.split("/")] for n in range(1, len(parts))}
    for name, value in ((f"{n}/{BASE}" if n in folders_of else n, v) for n, v in flat.items()):
        *folders, last = name.split("/")
        at = tree
        for folder in folders:
            at = at.setdefault(folder, {})
        at[last] = value
    return tree


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn {'a': {'b': ..}} into 'a/b', and undo what `nested` did for weights with factors of LoRA."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {prefix + str(key): value}
    weight = prefix.removesuffix("/")
    if f"{prefix}{BASE}" in found and any(f"{prefix}{factor}" in found for factor in FACTORS):
        found = {weight if name == f"{prefix}{BASE}" else name: value for name, value in found.items()}
    return found


def _wants(what: str, package: str, extra: str) -> UserError:
    return UserError(
        f"format {what}", expected=f"{package} to be installed", got="no such package", do=f"pip install '{extra}'"
    )


def write_meta(reader: Reader, out: Path) -> None:
    (out / META).write_text(json.dumps(dict(reader.meta), indent=1) + "\n")


def read_meta(source: Path) -> dict[str, Any] | None:
    """Return our meta from an export of ours; None if the folder comes from elsewhere."""
    path = source / META
    if not path.is_file():
        return None
    try:
        meta = json_files.loads(path.read_text(encoding="utf-8"))
        if not isinstance(meta, dict):
            raise ValueError(f"{meta!r:.60}")
        if (bad := wrong(meta, NEEDED)) is not None:
            raise ValueError(f"{bad[0]}: {bad[2]} instead of {bad[1]}")
    except (ValueError, OSError) as error:
        raise of_reading(error)(
            f"file {path}",
            expected="the JSON that an export of a run wrote",
            got=str(error),
            do="Export again, or remove it to begin a new run with the parameters alone.",
        ) from error
    return meta


# ---- Orbax


def _checkpointer() -> Any:
    try:
        import orbax.checkpoint as ocp
    except ImportError:
        raise _wants("orbax", "orbax-checkpoint", "orbax-checkpoint") from None
    return ocp.StandardCheckpointer()


def to_orbax(reader: Reader, out: Path) -> list[str]:
    with _checkpointer() as checkpointer:
        checkpointer.save((out / "state").absolute(), nested(tensors(reader)))
    write_meta(reader, out)
    return ["state", META]


def from_orbax(source: Path) -> Tensors:
    with _checkpointer() as checkpointer:
        path = (source / "state" if (source / "state").is_dir() else source).absolute()
        try:
            restored = checkpointer.restore(path)
        except Exception as error:
            raise _unreadable(source, "a folder that Orbax's StandardCheckpointer wrote", error) from error
    return {name: np.asarray(value) for name, value in flat(restored).items()}


# ---- torch


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise _wants("dcp or torch", "torch", "portatrain[torch]") from None
    return torch


def _as_torch(array: np.ndarray) -> Any:
    torch = _torch()
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _as_numpy(tensor: Any) -> np.ndarray:
    torch = _torch()
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Suppress DCP's warning that there is no process group: none is needed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def to_dcp(reader: Reader, out: Path) -> list[str]:
    _torch()
    import torch.distributed.checkpoint as dcp

    state = {name: _as_torch(array) for name, array in tensors(reader).items()}
    with _alone():
        dcp.save(state, checkpoint_id=out, no_dist=True)
    write_meta(reader, out)
    return sorted(p.name for p in out.iterdir())


def from_dcp(source: Path) -> Tensors:
    torch = _torch()
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    try:
        found = dcp.FileSystemReader(source).read_metadata().state_dict_metadata
        state = {
            name: torch.empty(tuple(about.size), dtype=about.properties.dtype)
            for name, about in found.items()
            if isinstance(about, TensorStorageMetadata)
        }
        with _alone():
            dcp.load(state, checkpoint_id=source, no_dist=True)
    except Exception as error:
        raise _unreadable(source, "a folder that torch.distributed.checkpoint wrote", error) from error
    return {name: _as_numpy(tensor) for name, tensor in state.items()}


def to_torch(reader: Reader, definition: Definition, out: Path) -> list[str]:
    """Write model.pt: everything that the lowered module's `load_state_dict` asks for."""
    torch, state = _torch(), {}
    held = {role: tensors(reader, role) for role in ("params", "state")}
    for key, role, name, index in torch_names(definition):
        array = held[role][name]
        state[key] = _as_torch(np.array(array[index]) if index else array)
    torch.save(state, out / "model.pt")
    return ["model.pt"]


def torch_names(definition: Definition) -> Iterator[tuple[str, str, str, tuple[int, ...]]]:
    """Yield (key, role, name, index) of every entry of the lowered nn.Module's state_dict: slice `index` of the Stacks'
    axes of a tensor. A tied parameter has several keys."""

    def below(value: Any, key: str, index: tuple[int, ...]) -> Iterator[tuple[str, str, str, tuple[int, ...]]]:
        if isinstance(value, (Param, State)):
            role = "params" if isinstance(value, Param) else "state"
            yield key, role, definition.owners[id(value)], index
            return
        if isinstance(value, Stack):
            for i in range(value.n):
                yield from below(value.block, f"{key}.{i}", (*index, i))
        inside: Any = ()
        if isinstance(value, Module):
            inside = [(n, v) for n, v in vars(value).items() if not (isinstance(value, Stack) and n == "block")]
        elif isinstance(value, (list, tuple)):
            inside = enumerate(value)
        elif isinstance(value, dict):
            inside = value.items()
        for name, held in inside:
            yield from below(held, f"{key}.{name}", index)

    for key, role, name, index in below(definition.model, "", ()):
        yield key.removeprefix("."), role, name, index


def to_nnx(reader: Reader, definition: Definition, out: Path) -> list[str]:
    """Write parameters by the paths of the lowered module, as `nnx.replace_by_pure_dict` takes them."""
    try:
        from flax import serialization

        from portatrain.backends.jax.lower import lower
    except ImportError:
        raise _wants("nnx", "flax", "portatrain[jax]") from None
    _, paths = lower(definition, lambda role, name: np.zeros(()))
    held = tensors(reader, "params")
    found = {"/".join(map(str, path)): held[name] for path, (role, name) in paths.items() if role == "params"}
    (out / "state.msgpack").write_bytes(serialization.msgpack_serialize(nested(found)))
    return ["state.msgpack"]


def _unreadable(source: Path, expected: str, error: Exception) -> UserError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return UserError(
        f"folder {source}", expected=expected, got=lines[0][:200], do="Check the path and --from; `--help` lists them."
    )
