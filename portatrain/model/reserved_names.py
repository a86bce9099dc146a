"""Names that no attribute of a module may have, because the native module classes use them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from portatrain.errors import UserError

# Public attributes of torch.nn.Module (2.11 to 2.13) and flax.nnx.Module (0.12), and our own. A test checks the list.
_RESERVED = """
    T_destination add_module apply bfloat16 buffers call_super_init children compile cpu cuda double dump_patches
    eval extra_repr float forward get_buffer get_extra_state get_parameter get_submodule half ipu iter_children
    iter_modules load_state_dict modules mtia named_buffers named_children named_modules named_parameters parameters
    perturb register_backward_hook register_buffer register_forward_hook register_forward_pre_hook
    register_full_backward_hook register_full_backward_pre_hook register_load_state_dict_post_hook
    register_load_state_dict_pre_hook register_module register_parameter register_state_dict_post_hook
    register_state_dict_pre_hook requires_grad_ set_attributes set_extra_state set_submodule share_memory sow
    state_dict to to_empty train training type xpu zero_grad
    path site after_step
"""
RESERVED_NAMES = frozenset(_RESERVED.split())


def check_names(kind: str, attributes: Mapping[str, Any], held: Sequence[str]) -> None:
    """Raise UserError for an attribute whose name the native classes use: one of the two would hide the other.

    kind: the name of the module's class. held: the relative names of the tensors and modules that it holds.
    """
    ours = {"path": str, "site": int}  # the types that `describe` sets
    taken = [n for n, v in attributes.items() if n in RESERVED_NAMES and not isinstance(v, ours.get(n, ()))]
    for name in held:
        # Keys of dicts become attributes of an nn.ModuleDict, which also has the methods of a dict.
        first, *keys = name.split("/")
        if name.startswith("_") or "." in name:
            taken.append(first if "." not in name else name)
        taken += [key for key in keys if key in RESERVED_NAMES or hasattr(dict, key)]
    if taken:
        raise UserError(
            f"{kind}.{taken[0]}",
            expected="a name that torch.nn.Module and flax.nnx.Module do not use, without '.' or a leading '_'",
            got=repr(taken[0]),
            do=f"Rename it, for instance to {taken[0].strip('_').replace('.', '_') or 'weight'}_1.",
        )
