"""Direct preference optimisation: the loss and its gradient are those of two models of transformers in float64, and a
run with a frozen copy moves between frameworks and meshes on one curve."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints_format import LocalStore, Reader
from portatrain.backends.base import backend_class, missing
from portatrain.backends.program import make_program
from portatrain.checkpoint.interop.hub_start import first_state
from portatrain.cli import main
from portatrain.errors import UserError
from portatrain.model.lora import is_factor
from portatrain.recipe import Recipe, apply_overrides, load_recipe
from portatrain.runs.run_dir import RunDir
from portatrain.testing.tolerance import MOVE, tolerance
from portatrain.training.trainer import train
from recipes import chats
from recipes.models.mixtral import MixtralConfig
from recipes.models.preference import DPOConfig
from tests.support import forks
from tests.support.hub_models import as_ours, by_file_names, made, ours
from tests.support.running import BACKENDS, Running, everything, microbatches
from tests.support.short_runs import losses

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

BETA, DRAWS, SEQ = 0.3, 3, 24
VOCAB = 40
CONFIG: dict[str, Any] = {
    **{"model_type": "gemma2", "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "query_pre_attn_scalar": 4},
    **{"sliding_window": 5, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 3.0},
    **{"max_position_embeddings": 64, "pad_token_id": None},
}
"""Windows, which packed sides must not reach across, and softcaps."""


def pairs(rows: int = 4) -> dict[str, np.ndarray]:
    """Pairs of random tokens; the last row is blank, as in the last batch of an evaluation."""
    rng = np.random.default_rng(0)
    batch = {k: np.zeros((rows, SEQ), np.int32) for k in ("tokens", "targets", "segment_ids", "positions")}
    batch |= {"mask": np.zeros((rows, SEQ), np.float32), "sample": np.arange(rows, dtype=np.int64)}
    for row in range(rows - 1):
        at = 0
        for side in (1, 2):
            n = int(rng.integers(4, 13))
            ids, here = rng.integers(0, VOCAB, n + 1), slice(at, at + n)
            batch["tokens"][row, here], batch["targets"][row, here] = ids[:-1], ids[1:]
            batch["segment_ids"][row, here], batch["positions"][row, here] = side, np.arange(n)
            batch["mask"][row, here] = np.arange(n) >= n // 3  # a question, and its answer
            at += n
    batch["sample"][-1] = -1
    return batch


def margins(policy: Any, reference: Any, batch: dict[str, np.ndarray]) -> Any:
    """The margin of every pair: each side is run alone, without padding."""

    def likelihood(model: Any, row: int, side: int) -> Any:
        here = batch["segment_ids"][row] == side
        ids, targets = (torch.tensor(batch[k][row, here], dtype=torch.long) for k in ("tokens", "targets"))
        logp = torch.log_softmax(model(ids[None]).logits[0], -1).gather(1, targets[:, None])[:, 0]
        return (logp * torch.tensor(batch["mask"][row, here], dtype=torch.float64)).sum()

    found = []
    for row in range(len(batch["tokens"]) - 1):
        with torch.no_grad():
            held = likelihood(reference, row, 1) - likelihood(reference, row, 2)
        found.append(BETA * (likelihood(policy, row, 1) - likelihood(policy, row, 2) - held))
    return torch.stack(found)


def double(model: Any) -> Any:
    copy = type(model)(model.config).double()
    copy.load_state_dict(model.state_dict())
    copy.set_attn_implementation("eager")
    return copy.eval()


def test_loss_and_gradients_are_those_of_two_models_of_transformers(tmp_path: Path) -> None:
    batch, held, folders = pairs(), [], [tmp_path / "policy", tmp_path / "reference"]
    for seed, folder in enumerate(folders):
        model = made(CONFIG, seed)
        model.save_pretrained(folder)
        held.append(double(model))
    recipe, params, _ = ours(folders[0])
    both = {**params, **{f"reference/{n}": a for n, a in ours(folders[1])[1].items()}}
    shapes = {name: a.shape for name, a in params.items()}

    def found() -> tuple[np.ndarray, float, dict[str, np.ndarray]]:
        held[0].zero_grad()
        margin = margins(*held, batch)
        loss = -torch.nn.functional.logsigmoid(margin).mean()
        loss.backward()
        grads = {name: p.grad.numpy() for name, p in held[0].named_parameters()}
        of_ours = as_ours(recipe.model.huggingface(), shapes, by_file_names("gemma2", grads))
        return margin.detach().numpy(), float(loss.detach()), of_ours

    margin, loss, exact = found()
    start = [{name: p.detach().clone() for name, p in model.named_parameters()} for model in held]
    rng, change = np.random.default_rng(1), dict.fromkeys(["margin", "loss", *exact], 0.0)
    for _ in range(DRAWS):
        for model, values in zip(held, start, strict=True):
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.copy_(values[name] * (1 + MOVE * torch.tensor(rng.choice((-1.0, 1.0), tuple(p.shape)))))
        near = found()
        moved = {"margin": near[0] - margin, "loss": near[1] - loss, **{n: near[2][n] - exact[n] for n in exact}}
        change = {n: max(change[n], float(np.abs(moved[n]).max()) / MOVE) for n in change}
    most = {n: tolerance(float(np.abs(a).max()), change[n]) for n, a in exact.items()}
    assert np.abs(margin).min() > 100 * tolerance(1.0, change["margin"])  # the two models differ

    names = frozenset(n for n in both if not n.startswith("reference/"))
    for backend in BACKENDS:
        running = Running(backend, DPOConfig(policy=recipe.model, beta=BETA).build(), trainable=names)
        running.params = both
        running.state = running.backend.restore_state(running.read)
        for parts in (1, 2) if backend == "torch" else (2,):
            our_loss, gradients = running.backend.gradients(running.state, microbatches(batch, parts), step=1)
            assert abs(our_loss - loss) <= tolerance(abs(loss), change["loss"]), backend
            wrong = {n: (float(np.abs(gradients[n] - exact[n]).max()), most[n]) for n in exact}
            assert not {n: w for n, w in wrong.items() if w[0] > w[1]}, backend
            assert set(gradients) == names  # the copy has none
        seen = running.backend.eval(running.state, batch)
        assert seen["weight_B"].tolist() == [1, 1, 1, 0] and seen["loss_B"][-1] == 0
        np.testing.assert_allclose(seen["reward_margin"][:-1], margin, rtol=0, atol=tolerance(1.0, change["margin"]))
        assert seen["reward_accuracy"][:-1].tolist() == (margin > 0).tolist()


SMALL = [
    *("model.policy.embed=32", "model.policy.layers=2", "model.policy.heads=2", "model.policy.mlp=48"),
    *("steps=6", "batch=8", "accumulation=2", "schedule.warmup=2", "eval_every=none", "eval_final_batches=2"),
    *("optimizer.lr=1e-3", "data.seq_len=120"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chats, pairs and their tokenizer, and the weights that a policy and its copy begin with."""
    at = tmp_path_factory.mktemp("chats")
    chats.write(at)
    config = dict(apply_overrides(load_recipe("tiny-dpo"), SMALL).model.huggingface().config)  # type: ignore[attr-defined]
    made({**config, "initializer_range": 0.02}, 0).save_pretrained(at / "base")
    return at


def words(folder: Path, *more: str) -> list[str]:
    data = (f"data.paths={folder}/pairs.jsonl", f"data.tokenizer={folder}/tokenizer")
    return [*SMALL, *data, f"init={folder / 'base'}", *more]


def small(folder: Path, *more: str) -> Recipe:
    return apply_overrides(load_recipe("tiny-dpo"), words(folder, *more))


def params_in(run: RunDir, step: int) -> dict[str, np.ndarray]:
    with LocalStore(run.path / f"checkpoints/step-{step:08d}") as store:
        reader = Reader(store)
        return {n: reader.read(n) for n in reader.names if n.startswith("params/")}


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_copy_begins_as_the_policy_and_has_no_state_of_the_optimizer(backend: str, folder: Path) -> None:
    for recipe in (small(folder, "lora=LoRA", "ema_decay=0.9"), small(folder, "init=none", "lora=LoRA")):
        lowered = backend_class(backend)(make_program(recipe))
        state = everything(lowered, first_state(lowered, recipe))
        copies = {n for n in state if n.startswith("params/reference/")}
        assert len(copies) > 20
        for name in copies:
            assert (state[name] == state[name.replace("reference/", "")]).all(), name
        assert {n.partition("/")[0] for n in state if "/reference/" in n} == {"params"}
        trained = {n for n in recipe.describe().params if recipe.trains(n)}
        assert trained and all(is_factor(n) and not n.startswith("reference/") for n in trained)


def test_what_cannot_be_a_policy_is_refused() -> None:
    for thawed in ("frozen=()", "frozen=reference/embed/*"):
        with pytest.raises(UserError, match=r"frozen: expected 'reference/\*', .* that trains \d+ of them"):
            make_program(apply_overrides(load_recipe("tiny-dpo"), [thawed]))
    sizes = MixtralConfig(vocab=32, embed=16, layers=1, heads=2, mlp=8, experts=2, chosen=1, expert_mlp=8)
    with pytest.raises(UserError, match=r"a dense decoder of recipes/models, .* got MixtralConfig"):
        DPOConfig(policy=sizes).build()
    with pytest.raises(UserError, match="a number above 0"):
        DPOConfig(policy=sizes, beta=0.0)


def test_imports_give_the_copy_the_weights_of_the_policy(folder: Path, tmp_path: Path) -> None:
    """From a folder of transformers, and from the parameters of a run that has the policy alone."""
    base, chat, dcp = folder / "base", tmp_path / "chat", tmp_path / "dcp"
    sizes = [word for size in SMALL[:4] for word in ("--set", size.replace(".policy", ""))]
    assert (
        main(["ckpt", "import", str(base), "tiny-chat", "--run-dir", str(chat), "--from", "huggingface", *sizes]) == 0
    )
    assert main(["ckpt", "export", str(chat), str(dcp), "--to", "dcp"]) == 0
    (dcp / "portatrain.json").unlink()
    sizes = [word for size in words(folder, "init=none") for word in ("--set", size)]
    for source, kind in ((base, "huggingface"), (dcp, "dcp")):
        run = RunDir(tmp_path / f"from-{kind}")
        assert (
            main(["ckpt", "import", str(source), "tiny-dpo", "--run-dir", str(run.path), "--from", kind, *sizes]) == 0
        )
        found = params_in(run, 0)
        for name, array in ours(base)[1].items():
            assert (found[f"params/{name}"] == array).all() and (found[f"params/reference/{name}"] == array).all(), name


@pytest.fixture(scope="module")
def processes() -> Iterator[None]:
    with forks.serving():
        yield


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.skipif(bool(missing("jax")), reason="jax is not installed")
def test_one_curve_on_frameworks_and_a_mesh_and_over_moves(folder: Path, tmp_path: Path, processes: None) -> None:
    recipe = small(folder)
    whole, moved = (RunDir(tmp_path / what) for what in ("whole", "moved"))
    sizes = [word for size in words(folder) for word in ("--set", size)]
    how = ["--backend", "torch", "--devices", "2", "--mesh", "fsdp=2", "--stop-at", "2", *sizes]
    command = [sys.executable, "-m", "portatrain.cli", "train", "tiny-dpo", "--run-dir", str(moved.path), *how]

    assert train(recipe, whole, backend="jax") == 0
    done = forks.run(command)
    assert done.returncode == 85, done.stderr[-2000:]
    assert train(recipe, moved, backend="torch", stop_at=4) == 85
    assert train(recipe, moved, backend="jax") == 0
    assert [seam["verdict"] for seam in moved.events("resumed")] == ["continuous"] * 2
    # A margin is beta times a difference of sums of log-likelihoods; their rounding is what the loss can differ by.
    nats = recipe.data.seq_len * np.log(recipe.model.policy.vocab)  # type: ignore[attr-defined]
    bound = tolerance(recipe.model.beta * float(nats), 0.0)  # type: ignore[attr-defined]
    assert max(abs(a - b) for a, b in zip(losses(whole), losses(moved), strict=True)) <= bound
    first, last = (whole.curve()[i]["aux"]["reward_margin"] for i in (0, -1))
    assert abs(losses(whole)[0] - np.log(2)) <= bound and first == 0  # the policy is its copy
    assert last > 1000 * bound and whole.events("eval")[-1]["metrics"]["reward_accuracy"] > 0.6
    ended = params_in(moved, recipe.steps)
    for name, array in ours(folder / "base")[1].items():
        assert (ended[f"params/reference/{name}"] == array).all(), name
        assert (ended[f"params/{name}"] != array).any(), name

    # The policy leaves as a model of its family, from which another run begins.
    out, run = tmp_path / "out", RunDir(tmp_path / "lora")
    assert main(["ckpt", "export", str(moved.path), str(out), "--to", "huggingface"]) == 0
    for name, array in ours(out)[1].items():
        assert (array == ended[f"params/{name}"]).all()
    assert train(small(folder, "lora=LoRA", "lora.rank=2", f"init={out}"), run, backend="torch") == 0
    assert abs(losses(run)[0] - np.log(2)) <= bound and run.curve()[-1]["aux"]["reward_margin"] > 1000 * bound
    assert main(["ckpt", "export", str(run.path), str(tmp_path / "merged"), "--to", "huggingface"]) == 0
    merged, kept = ours(tmp_path / "merged")[1], params_in(run, recipe.steps)
    for name, array in merged.items():
        adapted = f"params/{name}/lora_a" in kept
        assert (kept[f"params/{name}"] == ended[f"params/{name}"]).all() and (
            array != kept[f"params/{name}"]
        ).any() == adapted
