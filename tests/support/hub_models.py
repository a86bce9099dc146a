"""Random small models of every family in transformers, and our own of the same folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_format import Box, LocalStore, Reader
from portatrain.backends.state import full_name
from portatrain.checkpoint.interop import export_import, huggingface
from portatrain.checkpoint.interop.families import sizes_from
from portatrain.checkpoint.interop.hub_table import Hub
from portatrain.data import TokenMemmap
from portatrain.model.module import describe
from portatrain.recipe import Recipe, load_recipe
from recipes.models.olmo_hybrid import OTHER_NAMES

FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "olmo3", "smollm3", "phi3", "gpt2"),
)
ROUTED = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")
RECURRENT = ("olmo_hybrid",)
SEQ = 24
LONGEST = 64


def random_config(kind: str, rng: np.random.Generator) -> dict[str, Any]:
    """A config.json of that model_type: odd numbers of heads, one kv head, head sizes apart from hidden / heads, tied
    and untied tables, biases, windows, every rotary scaling."""

    def pick(*values: Any) -> Any:
        return values[int(rng.integers(len(values)))]

    heads, layers, vocab = pick(1, 2, 3, 4, 6), pick(1, 2, 3, 5), int(rng.integers(20, 60))
    common: dict[str, Any] = {"model_type": kind, "vocab_size": vocab, "bos_token_id": 0, "eos_token_id": 0}
    common |= {"pad_token_id": None, "tie_word_embeddings": pick(True, False)}
    if kind == "gpt2":
        inner = pick(None, 20, 36)
        return {
            **common,
            "n_embd": 8 * heads,
            "n_layer": layers,
            "n_head": heads,
            "n_positions": pick(SEQ, LONGEST),
            "n_inner": inner,
            "activation_function": pick("gelu_new", "gelu", "relu", "gelu_pytorch_tanh"),
            "layer_norm_epsilon": pick(1e-5, 1e-3),
        }
    if kind in ROUTED:
        return {**common, **_routed_config(kind, heads, layers, pick, rng)}
    if kind in RECURRENT:
        return {**common, **_recurrent_config(heads, max(layers, 2), pick, rng)}
    divisors = [n for n in range(1, heads + 1) if heads % n == 0]
    head_dim, free = pick(4, 6, 8, 12), kind in ("mistral", "qwen2", "qwen3")
    hidden = heads * head_dim if kind == "phi3" else pick(12, 20, 28) if free else heads * pick(4, 6)
    common |= {
        "hidden_size": hidden,
        "intermediate_size": pick(20, 36),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": pick(*divisors),
        "rms_norm_eps": pick(1e-6, 1e-4),
        "max_position_embeddings": LONGEST,
    }
    common |= {} if kind == "phi3" else {"head_dim": head_dim}
    if kind in ("llama", "qwen3", "gemma2", "gemma3_text", "olmo2", "olmo3", "smollm3"):
        common["attention_bias"] = pick(True, False)
    if kind in ("llama", "smollm3"):
        common["mlp_bias"] = pick(True, False)
    if kind in ("mistral", "phi3"):
        common["sliding_window"] = pick(None, 3, 7, 40)
    if kind in ("qwen2", "qwen3", "smollm3"):
        common |= {"use_sliding_window": pick(True, False), "sliding_window": pick(3, 7)}
    if kind in ("qwen2", "qwen3"):
        common |= {"max_window_layers": int(rng.integers(layers + 1))}
    if kind == "smollm3":
        common["no_rope_layer_interval"] = pick(2, 3, 4)
    if kind.startswith("gemma") or kind == "olmo3":
        common |= {"sliding_window": pick(3, 7)}
        common |= (
            {"layer_types": [pick("full_attention", "sliding_attention") for _ in range(layers)]} if pick(0, 1) else {}
        )
    if kind.startswith("gemma"):
        common |= {"query_pre_attn_scalar": pick(4, 9), "final_logit_softcapping": pick(None, 5.0)}
        common |= {"attn_logit_softcapping": pick(None, 3.0)} if kind == "gemma2" else {}
    rope = random_rope(head_dim, rng, ("longrope", "partial") if kind == "phi3" else None)
    if kind in ("gemma3_text", "olmo3"):
        if rope["rope_type"] == "dynamic":  # transformers 5.23 changes the wrong table of two
            rope = {"rope_type": "linear", "factor": 4.0}
        local = {"rope_type": "default", "rope_theta": pick(50.0, 1000.0)}
        common["rope_parameters"] = {"full_attention": {"rope_theta": 1e4, **rope}, "sliding_attention": local}
        return common
    if rope["rope_type"] == "dynamic":
        common["max_position_embeddings"] = pick(8, SEQ, LONGEST)
    if kind == "phi3":
        common["original_max_position_embeddings"] = rope.get("original_max_position_embeddings", 8)
    return {**common, "rope_parameters": {"rope_theta": pick(50.0, 1e4), **rope}}


def _routed_config(kind: str, heads: int, layers: int, pick: Any, rng: np.random.Generator) -> dict[str, Any]:
    """The fields of a mixture of experts: one or all experts chosen, groups, dense layers, latents."""
    experts, head_dim = pick(2, 4, 6), pick(4, 6, 8)
    found: dict[str, Any] = {
        "hidden_size": pick(12, 20, 28),
        "intermediate_size": pick(20, 36),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": pick(*(n for n in range(1, heads + 1) if heads % n == 0)),
        "head_dim": head_dim,
        "rms_norm_eps": pick(1e-6, 1e-4),
        "max_position_embeddings": LONGEST,
        "num_experts_per_tok": int(rng.integers(1, experts + 1)),
    }
    rope = random_rope(head_dim, rng)
    if kind == "mixtral":
        found |= {"num_local_experts": experts, "sliding_window": pick(None, 7)}
    if kind == "gpt_oss":
        found |= {"num_local_experts": experts, "sliding_window": pick(3, 7), "swiglu_limit": pick(0.5, 7.0)}
        found |= {"layer_types": [pick("full_attention", "sliding_attention") for _ in range(layers)]}
    if kind == "qwen3_moe":
        found |= {"num_experts": experts, "moe_intermediate_size": pick(12, 20), "norm_topk_prob": pick(True, False)}
        found |= {
            "decoder_sparse_step": pick(1, 2),
            "mlp_only_layers": pick([], [0]),
            "attention_bias": pick(True, False),
        }
        found |= {"use_sliding_window": pick(True, False), "sliding_window": 5}
    if kind == "deepseek_v3":
        groups, size = pick(1, 2, 3), pick(2, 4)
        chosen, rotary = int(rng.integers(1, groups + 1)), pick(4, 6)
        found |= {"n_routed_experts": groups * size, "n_group": groups, "topk_group": chosen}
        found |= {"num_experts_per_tok": int(rng.integers(1, chosen * size + 1)), "norm_topk_prob": pick(True, False)}
        found |= {"moe_intermediate_size": pick(12, 20), "n_shared_experts": pick(1, 2)}
        found |= {"first_k_dense_replace": int(rng.integers(layers)), "routed_scaling_factor": pick(1.0, 2.5)}
        found |= {"q_lora_rank": pick(None, 10), "kv_lora_rank": pick(8, 12), "rope_interleave": pick(True, False)}
        found |= {"qk_rope_head_dim": rotary, "qk_nope_head_dim": pick(4, 7), "v_head_dim": pick(4, 5)}
        found |= {"num_key_value_heads": heads, "head_dim": rotary}
        yarn = {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": pick(0.7, 1.0)}
        rope = pick({"rope_type": "default"}, {**yarn, "original_max_position_embeddings": 16})
    if rope["rope_type"] == "dynamic":
        found["max_position_embeddings"] = pick(8, SEQ, LONGEST)
    return {**found, "rope_parameters": {"rope_theta": pick(50.0, 1e4), **rope}}


def _recurrent_config(heads: int, layers: int, pick: Any, rng: np.random.Generator) -> dict[str, Any]:
    """The fields of an OLMo Hybrid: key heads that serve several value heads, odd sizes, any order of its two kinds of
    layers, with and without rotary positions."""
    key_heads, head_dim = pick(1, 2, 3), pick(4, 6, 8)
    types = [pick("linear_attention", "full_attention") for _ in range(layers)]
    if len(set(types)) == 1:
        types[int(rng.integers(layers))] = {"linear_attention": "full_attention"}.get(types[0], "linear_attention")
    found: dict[str, Any] = {
        "hidden_size": pick(12, 20, 28),
        "intermediate_size": pick(20, 36),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": pick(*(n for n in range(1, heads + 1) if heads % n == 0)),
        "head_dim": head_dim,
        "rms_norm_eps": pick(1e-6, 1e-4),
        "max_position_embeddings": LONGEST,
        "attention_bias": pick(True, False),
        "layer_types": types,
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": key_heads * pick(1, 2, 3),
        "linear_key_head_dim": pick(3, 6, 8),
        "linear_value_head_dim": pick(4, 5, 12),
        "linear_conv_kernel_dim": pick(1, 2, 4),
        "linear_allow_neg_eigval": pick(True, False),
    }
    rope = random_rope(head_dim, rng)
    if rope["rope_type"] == "dynamic":
        found["max_position_embeddings"] = pick(8, SEQ, LONGEST)
    if pick(True, False):
        return {**found, "rope_theta": None, "rope_parameters": None}
    return {**found, "rope_parameters": {"rope_theta": pick(50.0, 1e4), **rope}}


def random_rope(head_dim: int, rng: np.random.Generator, of: tuple[str, ...] | None = None) -> dict[str, Any]:
    """Rotary parameters of a random type; `of`: longrope, for a part of a head, or neither."""
    types = ("default", "linear", "dynamic", "llama3", "yarn", "longrope") if of is None else ("default", "longrope")
    kind, original = types[int(rng.integers(len(types)))], int(rng.choice([8, 16, 32]))
    part = 0.5 if of is not None and head_dim % 4 == 0 and rng.integers(2) else 1.0
    more: dict[str, Any] = {} if part == 1 else {"partial_rotary_factor": part}
    n = int(head_dim * part) // 2
    match kind:
        case "linear" | "dynamic":
            more |= {"factor": 4.0}
        case "llama3":
            more |= {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        case "yarn":
            more |= {"factor": 4.0, "truncate": bool(rng.integers(2)), "beta_fast": 16.0, "beta_slow": 0.5}
        case "longrope":
            short, long = (sorted(float(x) for x in rng.uniform(1, top, n)) for top in (1.5, 6))
            more |= {"short_factor": short, "long_factor": long, "factor": 4.0}
    if kind in ("llama3", "yarn", "longrope"):
        more["original_max_position_embeddings"] = original
    return {"rope_type": kind, **more}


def made(config: Mapping[str, Any], seed: int) -> Any:
    """transformers' model of `config` in float32, with weights far from those of a fresh one: norms and biases move."""
    import torch
    import transformers

    torch.manual_seed(seed)
    known = transformers.AutoConfig.for_model(**config)
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_config(known, **eager).eval()
    balances = [buffer for name, buffer in model.named_buffers() if name.endswith("correction_bias")]
    with torch.no_grad():
        for parameter in (*model.parameters(), *balances):
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.2))
    return model


def recipe_for(sizes: Any) -> Recipe:
    """A recipe with the model of a folder."""
    from dataclasses import replace

    data = TokenMemmap(paths="none", seq_len=SEQ, vocab=sizes.vocab, dtype="uint16")
    return replace(load_recipe("tiny-lm"), model=sizes, data=data, hooks=())


def ours(folder: Path) -> tuple[Recipe, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The recipe that the folder's config.json implies, its parameters and the States that the folder has, by our names
    (float32)."""
    sizes = sizes_from(json.loads((folder / "config.json").read_text()))
    recipe = recipe_for(sizes)
    definition = describe(sizes.build())
    shapes = {full_name(role, name): t.shape for (role, name), t in definition.tensors.items()}
    found = {name: read(Box.whole(shapes[name])) for name, read in huggingface.read(folder, recipe, shapes).items()}
    states = {name: found[full_name("state", name)] for name in definition.states if full_name("state", name) in found}
    return recipe, {name: found[full_name("params", name)] for name in definition.params}, states


def by_file_names(kind: str, held: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays by the names of a model's parameters in transformers 5, in which the experts of a layer are one tensor, by
    the names of its files."""
    if kind == "olmo_hybrid":
        return _cut_kernels(held)
    found: dict[str, np.ndarray] = {}
    parts = ("w1", "w3", "w2") if kind == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    for name, array in held.items():
        name = name.replace(".mlp.", ".block_sparse_moe.") if kind == "mixtral" else name
        if kind == "gpt_oss" or ".experts." not in name:
            found[name] = array
            continue
        path, _, last = name.rpartition(".")
        for x, each in enumerate(array):
            cut = np.split(each, 2) if last == "gate_up_proj" else [each]
            for part, piece in zip(parts[:2] if len(cut) == 2 else parts[2:], cut, strict=True):
                found[f"{path}.{x}.{part}.weight"] = piece
    return found


def _cut_kernels(held: Mapping[str, Any]) -> dict[str, Any]:
    """The kernels of queries, keys and values by themselves; an OLMo Hybrid in transformers has them in one tensor."""
    found = dict(held)
    for name in [n for n in held if n.endswith("linear_attn.conv1d.weight")]:
        kernels, at = found.pop(name), name.removesuffix("conv1d.weight")
        first = 0
        for part in "qkv":
            last = first + held[f"{at}{part}_proj.weight"].shape[0]
            found[f"{at}{part}_conv1d.weight"] = kernels[first:last]
            first = last
    return found


def as_ours(hub: Hub, shapes: Mapping[str, tuple[int, ...]], theirs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays under the names of transformers (weights, gradients) under our names."""
    found = {name: np.zeros(shape) for name, shape in shapes.items()}
    for row in hub.read:
        if row.state:
            continue
        inner = row.inner(shapes[row.ours])
        found[row.ours][row.leading] = row.taken(theirs[row.theirs], Box.whole(inner), inner)
    return found


def held_in(folder: Path) -> dict[str, Any]:
    """The tensors of a folder by their names."""
    import torch
    from safetensors.torch import load_file

    found = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    # transformers saves other names of an OLMo Hybrid, and cuts its kernels at other places, than the released files.
    for other, known in OTHER_NAMES.items():
        found = {n.replace(other, known): t for n, t in found.items()}
    for name in [n for n in found if n.endswith("q_conv1d.weight")]:
        at = name.removesuffix("q_conv1d.weight")
        found[f"{at}conv1d.weight"] = torch.cat([found.pop(f"{at}{part}_conv1d.weight") for part in "qkv"])
    return found


def in_and_out(source: Path, out: Path, recipe: Recipe, store: Path, dtype: str) -> tuple[dict[str, Any], ...]:
    """The tensors of a folder, and those of the folder that its checkpoint is exported to."""
    export_import.import_from(source, "huggingface", recipe, lambda _: LocalStore(store, create=True))
    with LocalStore(store) as opened:
        export_import.export_to(Reader(opened), "huggingface", out, dtype=dtype)
    return held_in(source), held_in(out)
