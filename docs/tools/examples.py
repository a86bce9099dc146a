"""The examples of the reference pages. tests/docs runs every one of them.

An example of an operation runs after OPS_SETUP; an example of a recipe's field is an assignment of `--set`.
"""

from __future__ import annotations

OPS_SETUP = """\
import numpy as np

from portatrain.backends.reference.ops import ReferenceOps

rng = np.random.default_rng(0)
B, S, E, H, K, D, V = 2, 4, 8, 4, 2, 6, 16
ops = ReferenceOps(seed=0, step=1, sample=np.arange(B), training=True)
x_BSE = rng.normal(size=(B, S, E))
table_VE = rng.normal(size=(V, E))
tokens_BS = rng.integers(0, V, size=(B, S))
"""

OPS = {
    "weight": "gain_E = ops.weight(np.ones(E))\nassert gain_E.shape == (E,)",
    "einsum": (
        'wq_EHD = rng.normal(size=(E, H, D))\nq_BSHD = ops.einsum("bse,ehd->bshd", x_BSE, wq_EHD)\n'
        "assert q_BSHD.shape == (B, S, H, D)"
    ),
    "embed": "assert ops.embed(table_VE, tokens_BS).shape == (B, S, E)",
    "bias": "assert ops.bias(x_BSE, np.ones(E)).shape == (B, S, E)",
    "rms_norm": "assert ops.rms_norm(x_BSE, np.ones(E), eps=1e-5).shape == (B, S, E)",
    "layer_norm": "assert ops.layer_norm(x_BSE, np.ones(E), np.zeros(E)).shape == (B, S, E)",
    "rope_table": (
        "cos, sin = ops.rope_table(ops.arange(S), D, theta=10_000.0)\nassert cos.shape == sin.shape == (S, D // 2)"
    ),
    "rope": "table = ops.rope_table(ops.arange(S), D)\nassert ops.rope(q_BSHD, table).shape == (B, S, H, D)",
    "attention": (
        "k_BTKD, v_BTKD = rng.normal(size=(2, B, S, K, D))\n"
        "out_BSHD = ops.attention(q_BSHD, k_BTKD, v_BTKD, causal=True, window=3)\n"
        "assert out_BSHD.shape == (B, S, H, D)\n"
        "narrow_BSHV = ops.attention(q_BSHD, k_BTKD, v_BTKD[..., :2], sinks=np.zeros(H))  # value heads of size 2\n"
        "assert narrow_BSHV.shape == (B, S, H, 2)"
    ),
    "dropout": "assert ops.dropout(x_BSE, 0.1, site=7).shape == (B, S, E)  # in a Module: site=self.site",
    "silu": "assert ops.silu(x_BSE).shape == x_BSE.shape",
    "gelu": "assert ops.gelu(x_BSE, approximate=True).shape == x_BSE.shape",
    "relu": "assert (ops.relu(x_BSE) >= 0).all()",
    "sigmoid": "assert (ops.sigmoid(x_BSE) < 1).all()",
    "tanh": "assert (abs(ops.tanh(x_BSE)) < 1).all()",
    "exp": "assert (ops.exp(x_BSE) > 0).all()",
    "log": "assert ops.log(ops.exp(x_BSE)).shape == x_BSE.shape",
    "softmax": "assert np.allclose(ops.softmax(x_BSE, axis=-1).sum(-1), 1)",
    "where": "assert (ops.where(x_BSE > 0, x_BSE, 0.0) >= 0).all()",
    "concat": "assert ops.concat([x_BSE, x_BSE], axis=1).shape == (B, 2 * S, E)",
    "cast": 'assert ops.cast(x_BSE > 0, "float32").shape == x_BSE.shape',
    "arange": "assert ops.arange(3).tolist() == [0, 1, 2]",
    "one_hot": "assert ops.one_hot(tokens_BS, V).shape == (B, S, V)",
    "top_k": "values_BSk, ids_BSk = ops.top_k(x_BSE, 2)\nassert values_BSk.shape == ids_BSk.shape == (B, S, 2)",
    "write": (
        "cache_BTKD = np.zeros((B, 10, K, D))\nfilled_BTKD = ops.write(cache_BTKD, k_BTKD, np.asarray(3))\n"
        "assert (filled_BTKD[:, 3 : 3 + S] == k_BTKD).all()"
    ),
    "sum": 'assert ops.sum(x_BSE, ("batch", "seq", "embed"), over=("batch", "seq")).shape == (E,)',
    "mean": 'assert ops.mean(x_BSE, ("batch", "seq", "embed"), over=("seq",)).shape == (B, E)',
    "stop_gradient": "assert ops.stop_gradient(x_BSE).shape == x_BSE.shape",
    "cross_entropy": (
        "loss = ops.cross_entropy(x_BSE, table_VE, tokens_BS, mask=np.ones((B, S)), z_loss=1e-4)\n"
        "assert loss.sum.shape == () and loss.weight_B.tolist() == [S, S]"
    ),
    "loss": (
        'square_B = ops.mean(x_BSE * x_BSE, ("batch", "seq", "embed"), over=("seq", "embed"))\n'
        "assert ops.loss(square_B, np.ones(B)).sum.shape == ()"
    ),
    "across_samples": (
        "def contrast(x_GNE, y_GNE, there_GN):\n"
        '    scores_GNM = ops.einsum("gne,gme->gnm", x_GNE, y_GNE, dtype="float32")\n'
        "    seen_GNM = ops.where(there_GN[:, None, :], scores_GNM, -1e9)\n"
        '    loss_GN = ops.logsumexp(seen_GNM) - ops.einsum("gne,gne->gn", x_GNE, y_GNE, dtype="float32")\n'
        '    weight_GN = ops.cast(there_GN, "float32")\n'
        "    return loss_GN * weight_GN, weight_GN\n\n\n"
        "assert ops.across_samples(contrast, x_BSE[:, 0], x_BSE[:, 1]).loss_B.shape == (B,)"
    ),
    "experts": (
        "# Two of four experts for each token, each a matrix of its own.\n"
        "w_XEF, b_XF = np.ones((4, E, E)), np.zeros((4, E))\n"
        "weights_BSC, experts_BSC = ops.top_k(ops.softmax(x_BSE[..., :4]), 2)\n\n\n"
        "def expert(ops, x_NE, w_XEF, b_XF):\n"
        "    return ops.grouped_bias(ops.grouped_matmul(x_NE, w_XEF), b_XF)\n\n\n"
        "assert ops.experts(expert, x_BSE, experts_BSC, weights_BSC, w_XEF, b_XF).shape == (B, S, E)"
    ),
    "grouped_matmul": (
        "def expert(ops, x_NE, w_XEF):\n"
        "    return ops.grouped_matmul(x_NE, w_XEF)  # each row by the matrix of its expert\n\n\n"
        'one_BSC = ops.cast(x_BSE[..., :1] > 0, "int32")  # expert 0 or 1\n'
        "assert ops.experts(expert, x_BSE, one_BSC, np.ones((B, S, 1)), np.ones((2, E, 3))).shape == (B, S, 3)"
    ),
    "grouped_bias": (
        "def expert(ops, x_NE, b_XE):\n"
        "    return ops.grouped_bias(x_NE, b_XE)  # each row with the bias of its expert\n\n\n"
        'one_BSC = ops.cast(x_BSE[..., :1] > 0, "int32")  # expert 0 or 1\n'
        "assert ops.experts(expert, x_BSE, one_BSC, np.ones((B, S, 1)), np.ones((2, E))).shape == (B, S, E)"
    ),
    "shard": 'assert ops.shard(x_BSE, "batch", "seq", None).shape == x_BSE.shape',
    "stack": (
        "from portatrain import Module, Stack\n\n\n"
        "class Double(Module):\n"
        "    def __call__(self, ops, x_BSE):\n"
        "        return 2 * x_BSE, None\n\n\n"
        "out_BSE, _ = Stack(Double(), 3)(ops, x_BSE)  # the Stack calls ops.stack\n"
        "assert np.allclose(out_BSE, 8 * x_BSE)"
    ),
    "name": 'hidden_BSE = ops.name(x_BSE, "hidden")  # a remat policy may keep what is named so',
    "aux": 'ops.aux("activation_size", abs(x_BSE).mean((1, 2)))  # one value a sample: (B,)',
    "tally": (
        "from portatrain import State\n\n\n"
        "class Counter(Module):\n"
        "    def __init__(self):\n"
        "        self.seen = State()\n\n"
        "    def __call__(self, ops, x_BSE):\n"
        '        ops.tally(self, seen=ops.sum(0 * x_BSE[..., 0] + 1, ("batch", "seq"), over=("batch", "seq")))\n'
        "        return x_BSE"
    ),
    "update": (
        "class Decaying(Counter):\n"
        "    def after_step(self, ops):\n"
        "        ops.update(self, seen=0.9 * self.seen)  # here a State is a plain array"
    ),
}

ARRAY_OPS = {
    "abs": "assert (ops.abs(x_BSE) >= 0).all()",
    "sign": "assert set(np.unique(ops.sign(x_BSE))) <= {-1.0, 0.0, 1.0}",
    "floor": "assert (ops.floor(x_BSE) <= x_BSE).all()",
    "sqrt": "assert np.allclose(ops.sqrt(x_BSE * x_BSE), abs(x_BSE))",
    "rsqrt": "assert np.allclose(ops.rsqrt(x_BSE * x_BSE) * abs(x_BSE), 1)",
    "sin": "assert np.allclose(ops.sin(x_BSE) ** 2 + ops.cos(x_BSE) ** 2, 1)",
    "cos": "assert np.allclose(ops.cos(0 * x_BSE), 1)",
    "erf": "assert np.allclose(x_BSE * (1 + ops.erf(x_BSE / 2**0.5)) / 2, ops.gelu(x_BSE))",
    "log1p": "assert np.allclose(ops.log1p(abs(x_BSE)), ops.log(1 + abs(x_BSE)))",
    "expm1": "assert np.allclose(ops.expm1(x_BSE), ops.exp(x_BSE) - 1)",
    "softplus": "assert np.allclose(-ops.softplus(-x_BSE), ops.log(ops.sigmoid(x_BSE)))",
    "clip": "assert abs(ops.clip(x_BSE, -0.5, 0.5)).max() <= 0.5",
    "maximum": "assert (ops.maximum(x_BSE, 0.0) == ops.relu(x_BSE)).all()",
    "minimum": "assert (ops.minimum(x_BSE, 0.0) <= 0).all()",
    "max": "assert ops.max(x_BSE, axis=(1, 2)).shape == (B,)",
    "min": "assert ops.min(x_BSE, axis=-1, keepdims=True).shape == (B, S, 1)",
    "argmax": "guess_BS = ops.argmax(x_BSE, axis=-1)\nassert guess_BS.shape == (B, S)",
    "argmin": "assert (ops.argmin(x_BSE) == ops.argmax(-x_BSE)).all()",
    "logsumexp": "assert np.allclose(ops.logsumexp(x_BSE), ops.log(ops.exp(x_BSE).sum(-1)))",
    "log_softmax": "assert np.allclose(ops.exp(ops.log_softmax(x_BSE)), ops.softmax(x_BSE, axis=-1))",
    "var": "assert ops.var(x_BSE, axis=(1, 2), keepdims=True).shape == (B, 1, 1)",
    "std": "assert np.allclose(ops.std(x_BSE) ** 2, ops.var(x_BSE))",
    "norm": "unit_BSE = x_BSE / ops.norm(x_BSE, keepdims=True)\nassert np.allclose(ops.norm(unit_BSE), 1)",
    "cumsum": "assert np.allclose(ops.cumsum(x_BSE, axis=1)[:, 1], x_BSE[:, 0] + x_BSE[:, 1])",
    "sort": "assert (np.diff(ops.sort(x_BSE), axis=-1) >= 0).all()",
    "argsort": (
        "order_BSE = ops.argsort(x_BSE, descending=True)\n"
        "assert (ops.take_along(x_BSE, order_BSE, axis=-1) == ops.sort(x_BSE, descending=True)).all()"
    ),
    "take_along": (
        "last_B11 = np.full((B, 1, 1), S - 1)  # one position of every sample\n"
        "assert (ops.take_along(x_BSE, last_B11, axis=1)[:, 0] == x_BSE[:, -1]).all()"
    ),
    "scatter_add": (
        "counts_BV = ops.scatter_add(np.zeros((B, V)), tokens_BS, np.ones((B, S)), axis=1)\n"
        "assert (counts_BV.sum(-1) == S).all()"
    ),
    "transpose": "assert ops.transpose(x_BSE, (0, 2, 1)).shape == (B, E, S)",
    "flip": "assert (ops.flip(x_BSE, axis=1)[:, 0] == x_BSE[:, -1]).all()",
    "roll": "assert (ops.roll(x_BSE, 1, axis=1)[:, 1:] == x_BSE[:, :-1]).all()",
    "pad": "assert ops.pad(x_BSE, axis=1, before=1, after=2).shape == (B, S + 3, E)",
    "join": "assert ops.join([x_BSE, x_BSE], axis=1).shape == (B, 2, S, E)",
    "split": "gate_BSE, up_BSE = ops.split(ops.concat([x_BSE, x_BSE], axis=-1), 2)\nassert (gate_BSE == up_BSE).all()",
    "conv": (
        "kernel_KED = rng.normal(size=(3, E, D))\n"
        'assert ops.conv(x_BSE, kernel_KED, padding="causal").shape == (B, S, D)'
    ),
    "pool": 'assert ops.pool(x_BSE, 2, kind="max").shape == (B, S // 2, E)',
    "resize": 'assert ops.resize(x_BSE, 2 * S, method="linear").shape == (B, 2 * S, E)',
    "scan": (
        "def cell(h_BD, in_BD):  # the carry, and one position of in_BSD\n"
        "    h_BD = ops.tanh(0.5 * h_BD + in_BD)\n"
        "    return h_BD, h_BD  # the next carry, and this position of the second result\n\n\n"
        'in_BSD = ops.einsum("bse,ed->bsd", x_BSE, rng.normal(size=(E, D)))  # as wide as the carry\n'
        "start_BD = 0 * in_BSD[:, 0]  # zeros with the batch, the dtype and the devices of in_BSD\n"
        "last_BD, h_BSD = ops.scan(cell, start_BD, in_BSD)\n"
        "assert (h_BSD[:, 0] == ops.tanh(in_BSD[:, 0])).all() and (h_BSD[:, -1] == last_BD).all()"
    ),
    "associative_scan": (
        "assert np.allclose(ops.associative_scan(lambda a, b: a + b, x_BSE), ops.cumsum(x_BSE, axis=1))"
    ),
    "noise": 'assert ops.noise(S, E, site=7, kind="uniform").shape == (B, S, E)  # in a Module: site=self.site',
}

RECIPE = {
    "name": "name=my-run",
    "model": "model.layers=2",
    "data": "data.seq_len=64",
    "optimizer": "optimizer=Lion",
    "parametrization": "parametrization=MuP parametrization.base={'embed':32,'heads':1,'kv_heads':1,'mlp':96}",
    "schedule": "schedule=WSD",
    "steps": "steps=1000",
    "batch": "batch=64",
    "accumulation": "accumulation=4",
    "batch_start": "batch_start=2 batch_ramp=100 accumulation=4",
    "batch_ramp": "batch_start=2 batch_ramp=100 accumulation=4",
    "seed": "seed=1",
    "init": "init=models/my-llama",
    "leave_out": "leave_out=51:54,60",
    "precision": "precision=bf16",
    "fp8_matmuls": "fp8_matmuls=*/mlp/* precision=fp8",
    "fp8_scaling": "fp8_scaling=tensor precision=fp8",
    "remat": "remat=dots",
    "clip_norm": "clip_norm=none",
    "max_skips": "max_skips=0",
    "spikes": "spikes=Spikes spikes.window=64 spikes.action=rewind",
    "referee": "referee=Referee referee.every=50 referee.by=cpu",
    "trainable": "trainable=blocks/*",
    "frozen": "frozen=embed/*",
    "lora": "lora=LoRA lora.rank=4",
    "decay": "decay=*",
    "no_decay": "no_decay=embed/*",
    "ema_decay": "ema_decay=0.999",
    "ema": "ema=blocks/* ema_decay=0.999",
    "eval_every": "eval_every=50",
    "eval_batches": "eval_batches=4",
    "eval_final_batches": "eval_final_batches=4",
    "checkpoint_every": "checkpoint_every=100",
    "checkpoint_every_s": "checkpoint_every_s=300",
    "checkpoint_keep": "checkpoint_keep=3",
    "checkpoint_keep_every": "checkpoint_keep_every=500",
    "checkpoint_keep_best": "checkpoint_keep_best=min:loss",
    "checkpoint_busy": "checkpoint_busy=skip",
    "probe_every": "probe_every=2",
    "statistics_every": "statistics_every=100",
}
"""Field -> assignments to tiny-lm, separated by a blank."""

RECIPE_PYTHON = {
    "compute": 'compute={"batch": ("replica", "fsdp")}',
    "params": 'params={"embed": "fsdp"}',
    "hooks": 'hooks=(TextSample(prompt="def "),)',
    "origin": "origin=Origin(step=800, samples=6400, tokens=1638400)",
}
"""Fields that are set in the file: field -> a keyword of `dataclasses.replace`."""

RULES = {
    "AdamW": "AdamW(lr=3e-4, b2=0.95, weight_decay=0.1)",
    "Lion": "Lion(lr=1e-4, weight_decay=1.0)",
    "SGD": "SGD(lr=0.1, momentum=0.9, nesterov=True)",
    "Adafactor": "Adafactor(lr=1e-2, relative=True)",
    "Muon": "Muon(lr=0.02, adamw=AdamW(lr=3e-4, b2=0.95))",
    "Constant": "Constant(warmup=100)",
    "Linear": "Linear(warmup=100, min_ratio=0.1)",
    "Cosine": "Cosine(warmup=100, min_ratio=0.1)",
    "WSD": 'WSD(warmup=100, decay=200, shape="sqrt")',
}

DATA = {
    "Stdlib": "Stdlib(seq_len=256)",
    "TextFiles": 'TextFiles(paths="corpus/**/*.txt", seq_len=256)',
    "Jsonl": 'Jsonl(paths="pages.jsonl", field="text", seq_len=256)',
    "Parquet": 'Parquet(paths="s3://bucket/corpus/**/*.parquet", field="text", seq_len=256)',
    "Arrow": 'Arrow(paths="corpus/train", template="{{ title }}\\n{{ text }}", seq_len=256)',
    "ArrayRecords": 'ArrayRecords(paths="corpus/*.array_record", field="text", seq_len=256)',
    "Megatron": 'Megatron(paths="corpus_text_document.idx", seq_len=256, vocab=50_257, separator=50_256)',
    "TokenMemmap": 'TokenMemmap(paths="tokens.bin", seq_len=256, vocab=50_257, separator=50_256)',
    "PackedTokens": 'PackedTokens(path="stores/text", seq_len=256)',
    "Preferences": 'Preferences(paths="pairs.jsonl", tokenizer="models/chat", bos="<s>", seq_len=2048)',
    "Digits": "Digits(validation=0.2)",
    "Mixture": ('Mixture(sources=(Stdlib(seq_len=256), TextFiles(paths="corpus", seq_len=256)), weights=(0.7, 0.3))'),
}
