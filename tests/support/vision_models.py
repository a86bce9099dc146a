"""Random small models of the families of vision in transformers, and batches for them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

VISION = ("vit", "siglip")
ROWS = 3


def random_config(kind: str, rng: np.random.Generator) -> dict[str, Any]:
    """A config.json of that model_type: odd numbers of heads, biases on and off, images that are not square."""

    def pick(*values: Any) -> Any:
        return values[int(rng.integers(len(values)))]

    def sizes(embed: int | None = None) -> dict[str, Any]:
        heads = pick(1, 2, 3)
        return {
            "hidden_size": embed or heads * pick(4, 6, 8),
            "num_attention_heads": 1 if embed else heads,
            "num_hidden_layers": pick(1, 2, 3),
            "intermediate_size": pick(10, 21),
            "layer_norm_eps": pick(1e-12, 1e-6, 1e-4),
            "hidden_act": pick("gelu", "gelu_pytorch_tanh", "relu"),
        }

    patch, channels = pick(2, 3), pick(1, 3)
    cut = {"patch_size": patch, "num_channels": channels}
    if kind == "vit":
        rows, columns = patch * pick(1, 2, 3), patch * pick(1, 2, 4)
        size = rows if rows == columns else [rows, columns]
        more = {"image_size": size, "qkv_bias": pick(True, False), "num_labels": pick(2, 3, 7)}
        return {"model_type": kind, **sizes(), **cut, **more}
    image = {**sizes(), **cut, "image_size": patch * pick(1, 2, 3)}
    text = {**sizes(), "vocab_size": pick(11, 24), "max_position_embeddings": pick(4, 7)}
    text |= {"projection_size": image["hidden_size"], "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0}
    return {"model_type": kind, "vision_config": image, "text_config": text}


def made(config: Mapping[str, Any], seed: int) -> Any:
    """transformers' model of `config` in float32, with weights far from those of a fresh one: norms and biases move."""
    import torch
    import transformers

    torch.manual_seed(seed)
    known = transformers.AutoConfig.for_model(**config)
    kind = transformers.AutoModelForImageClassification if config["model_type"] == "vit" else transformers.AutoModel
    model = kind.from_config(known, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.2))
    return model


def batch_of(sizes: Any, rng: np.random.Generator, rows: int = ROWS) -> dict[str, np.ndarray]:
    """A batch for a model of ours, of either family."""
    image = getattr(sizes, "image", sizes)
    shape = (getattr(image, "rows", None) or image.size, getattr(image, "columns", None) or image.size, image.channels)
    found = {"image": rng.normal(size=(rows, *shape)).astype(np.float32)}
    if hasattr(sizes, "text"):
        found["tokens"] = rng.integers(0, sizes.text.vocab, (rows, sizes.text.positions)).astype(np.int32)
    else:
        found["label"] = rng.integers(0, sizes.classes, rows).astype(np.int32)
    return {**found, "mask": np.ones(rows, np.float32), "sample": np.arange(rows, dtype=np.int64)}


def given_to(model: Any, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The arguments of transformers' model for a batch of ours."""
    import torch

    pixels = torch.tensor(batch["image"]).permute(0, 3, 1, 2).to(next(model.parameters()).dtype)
    if "tokens" in batch:
        return {"pixel_values": pixels, "input_ids": torch.tensor(batch["tokens"], dtype=torch.long)}
    return {"pixel_values": pixels}


OLDER = (
    (r"^vit\.layers\.", "vit.encoder.layer."),
    (r"\.attention\.([qkv])_proj\.", r".attention.attention.\1_proj."),
    (r"\.q_proj\.", ".query."),
    (r"\.k_proj\.", ".key."),
    (r"\.v_proj\.", ".value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
"""Names of a ViT's parameters in transformers 5 -> in its files."""


def by_file_names(kind: str, held: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays by the names of a model's parameters in transformers 5, by the names of its files."""
    found = {}
    for name, array in held.items():
        for pattern, now in OLDER if kind == "vit" else ():
            name = re.sub(pattern, now, name)
        found[name] = array
    return found
