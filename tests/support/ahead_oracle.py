"""Multi-token prediction by hand: the layers of transformers, and each document alone, as section 2.2 of DeepSeek-V3's
paper has it. There are no masks: the module of depth k gets the tokens that it may, and no others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn.functional import cross_entropy

CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v3",
    **{"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2},
    **{"num_key_value_heads": 2, "head_dim": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 6},
    **{"q_lora_rank": 10, "kv_lora_rank": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 64},
    **{"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 12},
    **{"n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5, "norm_topk_prob": True},
    **{"tie_word_embeddings": False, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0},
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}


class Oracle(torch.nn.Module):
    """A DeepSeek-V3 of `layers` layers and `depth` modules, with the names of tensors that its files have."""

    def __init__(self, *, layers: int, depth: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        config = transformers.AutoConfig.for_model(**CONFIG, num_hidden_layers=layers + depth)
        eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
        whole = transformers.AutoModelForCausalLM.from_config(config, **eager)
        self.model, self.lm_head, self.layers, self.depth = whole.model, whole.lm_head, layers, depth
        norm, size = type(whole.model.norm), config.hidden_size
        for module in whole.model.layers[layers:]:
            module.enorm, module.hnorm = norm(size, config.rms_norm_eps), norm(size, config.rms_norm_eps)
            module.eh_proj = torch.nn.Linear(2 * size, size, bias=False)
            module.shared_head = torch.nn.ModuleDict({"norm": norm(size, config.rms_norm_eps)})
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.2))

    def folder(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The config.json and the tensors of the folder in which DeepSeek-V3's files would be."""
        held = {name: tensor for name, tensor in self.state_dict().items() if "rotary" not in name}
        for depth in range(self.depth):
            held[f"model.layers.{self.layers + depth}.embed_tokens.weight"] = held["model.embed_tokens.weight"].clone()
            held[f"model.layers.{self.layers + depth}.shared_head.head.weight"] = held["lm_head.weight"].clone()
        config = {**CONFIG, "num_hidden_layers": self.layers, "num_nextn_predict_layers": self.depth}
        return config, held

    def losses(self, batch: Mapping[str, np.ndarray]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the summed loss of each sample, (B,), of the next token, and of each depth."""
        rows = len(batch["tokens"])
        main, ahead = torch.zeros(rows).double(), [torch.zeros(rows).double() for _ in range(self.depth)]
        for row in range(rows):
            segments = batch["segment_ids"][row]
            for document in np.unique(segments):
                at = np.flatnonzero(segments == document)
                one, more = self._document(*(batch[k][row][at] for k in ("tokens", "targets", "mask")))
                main[row] = main[row] + one
                for depth, loss in enumerate(more):
                    ahead[depth][row] = ahead[depth][row] + loss
        return main, ahead

    def _document(self, tokens: np.ndarray, targets: np.ndarray, mask: np.ndarray) -> Any:
        t, y = torch.tensor(tokens).long(), torch.tensor(targets).long()
        weight = torch.tensor(mask).double()
        embedded = self.model.embed_tokens(t)[None]
        h = embedded
        for layer in self.model.layers[: self.layers]:
            h = self._layer(layer, h)
        h, found = self.model.norm(h), []
        main = self._loss(h, y, weight)
        for k, layer in enumerate(self.model.layers[self.layers :], start=1):
            n = len(t) - k
            if n < 1:
                found.append(torch.zeros(()).double())
                continue
            joined = torch.cat([layer.enorm(embedded[:, k:]), layer.hnorm(h[:, :n])], dim=-1)
            h = layer.shared_head["norm"](self._layer(layer, layer.eh_proj(joined)))
            found.append(self._loss(h, y[k:], weight[k:]))
        return main, found

    def _layer(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[1]
        rotary = self.model.rotary_emb(x, torch.arange(n)[None])
        causal = torch.full((1, 1, n, n), -torch.inf, dtype=x.dtype).triu(1)
        out = layer(x, attention_mask=causal, position_ids=torch.arange(n)[None], position_embeddings=rotary)
        return out[0] if isinstance(out, tuple) else out

    def _loss(self, h: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (cross_entropy(self.lm_head(h[0]), y, reduction="none") * weight).sum()
