"""Evaluate a trained model on tasks of EleutherAI's lm-evaluation-harness, the package `lm_eval`.

`language_model` makes the harness's `LM` of a trained model; `evaluate_tasks` runs tasks on one. The package is
imported when it is used, and nothing is downloaded.

Shape letters: B rows, S positions, V vocab, C tokens of a continuation.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from portatrain.data.encode import Tokenized
from portatrain.errors import UserError, choice
from portatrain.training.left_to_right import batch_of
from portatrain.training.trained import TrainedModel

ROUND = 32
"""Lengths are rounded up to a multiple of this, so that few programs are compiled."""
LOGITS_BYTES = 1 << 30
"""The largest size of the logits of one batch, unless those of a single row are larger."""
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")
ONE_PROCESS = "DISABLE_MULTIPROC"
"""The harness's own switch against processes for standard errors."""
BOOTSTRAPS = 100_000
"""Samples for the standard errors that have no formula, as the harness draws by default."""

Tell = Callable[[str, int, int], None]
"""Called with the kind of requests, how many are done, and how many there are."""


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What tasks gave.

    Attributes:
        metrics: task or group -> metric -> value; 'acc', 'acc_stderr', with another filter 'acc,FILTER'.
        samples: task -> the number of its documents.
        versions: task -> its version.
        shots: task -> the number of examples before each question.
        release: the release of the harness.
        table: the table that the harness itself prints.
    """

    metrics: Mapping[str, Mapping[str, float]]
    samples: Mapping[str, int]
    versions: Mapping[str, str]
    shots: Mapping[str, int]
    release: str
    table: str


def evaluate_tasks(
    model: TrainedModel,
    tasks: Sequence[str],
    *,
    folder: Path | str | None = None,
    fewshot: int | None = None,
    limit: int | None = None,
    rows: int = 8,
    max_length: int | None = None,
    opened: bool | None = None,
    bootstraps: int = BOOTSTRAPS,
    tell: Tell = lambda kind, done, total: None,
) -> Evaluated:
    """Evaluate a trained model on tasks.

    Args:
        tasks: names of tasks, groups or tags.
        folder: a folder with definitions of tasks (YAML), and then only these are known. None: those in the package.
        fewshot: examples before each question; None: as each task says.
        limit: take the first documents of each task only.
        rows, max_length, opened: see `language_model`.
        bootstraps: samples for standard errors that have no formula; 0: none of these.

    Raises:
        UserError: the package is missing, there is no such task, its data are not on this machine, or the model cannot
            run it.
    """
    lm_eval = _package()
    manager = _manager(folder, tasks)
    model_ = language_model(model, rows=rows, max_length=max_length, opened=opened, tell=tell)
    try:
        with _quiet():
            found = lm_eval.simple_evaluate(
                model=model_,
                tasks=list(tasks),
                task_manager=manager,
                num_fewshot=fewshot,
                limit=limit,
                bootstrap_iters=bootstraps,
                log_samples=False,
            )
            table = _tables(found)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # of the harness, of a task's own code, or of the library that reads its data
        raise UserError(
            f"tasks {', '.join(tasks)}",
            expected="tasks that run without a network, on data that is on this machine",
            got=f"{type(error).__name__}: {str(error).strip() or 'no message'}",
            do="Nothing is downloaded. In the YAML of a task of your own, dataset_path: json with dataset_kwargs: "
            "{data_files: ...} names a local file.",
        ) from error
    return Evaluated(
        metrics={task: _metrics(values) for task, values in found["results"].items()},
        samples={task: int(n["effective"]) for task, n in found.get("n-samples", {}).items()},
        versions={task: str(version) for task, version in found.get("versions", {}).items()},
        shots={task: int(n) for task, n in found.get("n-shot", {}).items()},
        release=importlib.metadata.version("lm_eval"),
        table=table,
    )


def check_tasks(tasks: Sequence[str], folder: Path | str | None) -> None:
    """Raise UserError if the package, the folder or a task is missing."""
    _package()
    _manager(folder, tasks)


def language_model(
    model: TrainedModel,
    *,
    rows: int = 8,
    max_length: int | None = None,
    opened: bool | None = None,
    tell: Tell = lambda kind, done, total: None,
) -> Any:
    """Return a `lm_eval.api.model.LM` that answers with a trained model.

    Texts are encoded as the harness encodes them for the exported model: by the tokenizer, with the special tokens that
    its file adds. The log-likelihood of a continuation is a sum in float64, over the model's float32 logits.

    Args:
        rows: texts of a batch; fewer if their logits would be more than `LOGITS_BYTES`.
        max_length: the longest text in tokens; longer ones lose their beginning. None: that of the training samples.
        opened: True puts the id that opens a document before every text, as in training. None: only if the tokens of
            the model are bytes, of which no tokenizer could say so.

    Raises:
        UserError: the package is missing, the model has no tokenizer or no `predict`, or it does not read from left to
            right.
    """
    _package()
    return _class()(_Scorer(model, rows, max_length, opened, tell))


class _Scorer:
    """The part of the adapter that needs nothing of the harness: ids, log-likelihoods and continuations."""

    def __init__(self, model: TrainedModel, rows: int, max_length: int | None, opened: bool | None, tell: Tell) -> None:
        self.model, self.rows, self.tell = model, rows, tell
        texts = model.texts
        if texts.encoding is None:
            raise UserError(
                f"recipe {model.recipe.name}",
                expected="a model of texts, with its tokenizer",
                got="token ids, of which no tokenizer is known",
                do="Export it, put the tokenizer's files beside the weights, and evaluate that folder.",
            )
        self.texts, self.encoding = texts, texts.encoding
        self.first = texts.first if texts.first is not None else min(texts.stops, default=0)
        self.opened = not isinstance(self.encoding, Tokenized) if opened is None else opened
        self.max_length = max_length or model.recipe.data.tokens_per_sample() or 2048
        model.check_left_to_right(min(ROUND, self.max_length))

    @functools.cached_property
    def written_first(self) -> str:
        """The text of the id that begins a text, '' if it has none."""
        return self.encoding.token(self.first) if isinstance(self.encoding, Tokenized) else ""

    def ids(self, text: str, special: bool | None) -> list[int]:
        """Return the ids of a text; special: whether with special tokens, None: unless it is written with one."""
        if special is None:
            special = not (self.written_first and text.startswith(self.written_first))
        if special and isinstance(self.encoding, Tokenized):
            ids = self.encoding.special(text)
        else:
            ids = self.encoding(text.encode(), "a text of the task").tolist()
        opens = special and self.opened and ids[:1] != [self.first]
        return [self.first, *ids] if opens else ids

    def scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Return, for each (context, continuation), the log-likelihood and whether each token is the likeliest."""
        seen = [(context + rest)[-(self.max_length + 1) :] for context, rest in pairs]
        for (context, rest), ids in zip(pairs, seen, strict=True):
            if not context or not rest or len(rest) >= len(ids):
                raise UserError(
                    "a continuation of the task",
                    expected=f"from 1 to {self.max_length} tokens, after at least one other",
                    got=f"{len(rest)} after {len(context)}",
                    do="Give a larger --max-length, if the model can read such texts.",
                )
        order = sorted(range(len(pairs)), key=lambda n: (-len(seen[n]), n))
        found: dict[int, tuple[float, bool]] = {}
        while order:
            size = -(-(len(seen[order[0]]) - 1) // ROUND) * ROUND
            now, order = order[: self._rows(size)], order[self._rows(size) :]
            for number, answer in zip(now, self._batch([(seen[n], pairs[n][1]) for n in now], size), strict=True):
                found[number] = answer
            self.tell("log-likelihoods", len(found), len(pairs))
        return [found[n] for n in range(len(pairs))]

    def _rows(self, size: int) -> int:
        return max(1, min(self.rows, LOGITS_BYTES // (4 * size * self.encoding.vocab)))

    def _batch(self, texts: Sequence[tuple[list[int], list[int]]], size: int) -> Iterable[tuple[float, bool]]:
        tokens_BS, ends_B = np.zeros((self._rows(size), size), np.int32), np.ones(self._rows(size), np.int64)
        for row, (ids, _) in enumerate(texts):
            tokens_BS[row, : len(ids) - 1], ends_B[row] = ids[:-1], len(ids) - 1
        logits_BSV = self.model.predict(batch_of(tokens_BS, ends_B=ends_B))
        for row, (_, rest) in enumerate(texts):
            end = int(ends_B[row])
            logits_CV = np.asarray(logits_BSV[row, end - len(rest) : end], np.float64)
            high_C1 = logits_CV.max(axis=1, keepdims=True)
            sums_C = np.log(np.exp(logits_CV - high_C1).sum(axis=1)) + high_C1[:, 0]
            total = float((logits_CV[np.arange(len(rest)), rest] - sums_C).sum())
            if not np.isfinite(total):
                raise UserError(
                    f"recipe {self.model.recipe.name} after step {self.model.step}",
                    expected="finite logits",
                    got="some that are not finite",
                    do="Evaluate a checkpoint from before the run diverged, with --step.",
                )
            yield total, bool((logits_CV.argmax(axis=1) == rest).all())

    def continuations(self, texts: Sequence[str], options: Mapping[str, Any]) -> list[str]:
        """Return what the model adds to each text, with the options of the task."""
        given = dict(options)
        until = given.pop("until", None) or []
        until = [until] if isinstance(until, str) else list(until)
        most = int(given.pop("max_gen_toks", given.pop("max_tokens", 256)))
        temperature, top_p = float(given.pop("temperature", 0.0)), float(given.pop("top_p", 1.0))
        if given.pop("do_sample", temperature > 0) is False:
            temperature = 0.0
        if given:
            raise UserError(
                "generation_kwargs of the task",
                expected="until, max_gen_toks, do_sample, temperature and top_p",
                got=", ".join(sorted(given)),
                do="Leave the others out.",
            )
        room = self.max_length - most
        if room < 1:
            raise UserError(
                "generation_kwargs of the task",
                expected=f"max_gen_toks below {self.max_length}, the longest text of the model",
                got=str(most),
                do="Set max_gen_toks in the task, or give a larger --max-length, if the model can read such texts.",
            )
        prompts = [self.ids(text, None)[-room:] or [self.first] for text in texts]

        def told(progress: Any) -> None:
            self.tell("continuations", progress.texts, len(prompts))

        made = self.model.generate(
            prompts, max_tokens=most, temperature=temperature, top_p=top_p, rows=self.rows, progress=told
        )
        return [_cut(one.text or "", until) for one in made]


@functools.cache
def _class() -> Any:
    """Return the adapter, a subclass of a class of the harness."""
    base: Any = importlib.import_module("lm_eval.api.model").TemplateLM
    utils: Any = importlib.import_module("lm_eval.utils")

    class PortatrainLM(base):
        def __init__(self, scorer: _Scorer) -> None:
            super().__init__()
            self._scorer = scorer

        @property
        def eot_token_id(self) -> int:
            return min(self._scorer.texts.stops, default=self._scorer.first)

        @property
        def prefix_token_id(self) -> int:
            return self._scorer.first

        @property
        def max_length(self) -> int:
            return self._scorer.max_length

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **more: Any) -> list[int]:
            return self._scorer.ids(string, add_special_tokens)

        def _loglikelihood_tokens(self, requests: Any, **more: Any) -> list[tuple[float, bool]]:
            return self._scorer.scores([(context, rest) for _, context, rest in requests])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            pairs: list[tuple[list[int], list[int]]] = []
            counts = []
            for request in requests:
                windows = utils.get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
                found = [utils.make_disjoint_window(window) for window in windows]
                pairs += [(list(context), list(rest)) for context, rest in found]
                counts.append(len(found))
            each = iter(self._scorer.scores(pairs))
            return [sum(next(each)[0] for _ in range(count)) for count in counts]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            alike: dict[str, list[int]] = {}
            for number, request in enumerate(requests):
                alike.setdefault(repr(sorted(request.args[1].items())), []).append(number)
            found: dict[int, str] = {}
            for numbers in alike.values():
                texts = [requests[n].args[0] for n in numbers]
                made = self._scorer.continuations(texts, requests[numbers[0]].args[1])
                found |= dict(zip(numbers, made, strict=True))
            return [found[n] for n in range(len(requests))]

    return PortatrainLM


def _package() -> Any:
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "tasks",
            expected="EleutherAI's lm-evaluation-harness to be installed",
            got="no package lm_eval",
            do="Install it: pip install 'portatrain[lm-eval]'.",
        )
    if "datasets" not in sys.modules:  # these libraries look at the variables when they are imported
        for name in OFFLINE:
            os.environ[name] = "1"
        os.environ.setdefault("TQDM_DISABLE", "1")  # `tell` reports
    return importlib.import_module("lm_eval")


def _manager(folder: Path | str | None, tasks: Sequence[str]) -> Any:
    """Return the harness's index of tasks. Raises UserError if the folder or a task does not exist."""
    if folder is not None and not Path(folder).is_dir():
        raise UserError(
            f"folder {folder}", expected="a folder with definitions of tasks (YAML)", got="none", do="Correct the path."
        )
    make: Any = importlib.import_module("lm_eval.tasks").TaskManager
    with _quiet():
        found = make() if folder is None else make(include_path=str(folder), include_defaults=False)
    for task in tasks:
        if task not in found.all_tasks:
            where = "the package lm_eval" if folder is None else str(folder)
            raise choice(f"task {task!r} of {where}", task, found.all_tasks, "" if len(found.all_tasks) < 50 else _MANY)
    return found


_MANY = "`lm-eval ls tasks` lists them."


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """Return 'acc' for the harness's 'acc,none', and 'acc,FILTER' for another filter."""
    named = {name: value for name, value in values.items() if "," in name and isinstance(value, (int, float))}
    return {name.removesuffix(",none"): float(value) for name, value in named.items()}


def _tables(found: Mapping[str, Any]) -> str:
    make = importlib.import_module("lm_eval.utils").make_table
    return "\n".join(make(found, kind) for kind in ("results", "groups") if found.get(kind)).rstrip("\n")


def _cut(text: str, until: Iterable[str]) -> str:
    for stop in until:
        if stop:
            text = text.split(stop)[0]
    return text


@contextmanager
def _quiet() -> Any:
    """While the harness runs, let it log errors only, print to standard error, and start no processes: a process that
    is forked from one with jax's threads may wait for ever. Its standard errors are the same either way."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    before = os.environ.get(ONE_PROCESS)
    os.environ[ONE_PROCESS] = "1"
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.environ.pop(ONE_PROCESS)
        if before is not None:
            os.environ[ONE_PROCESS] = before
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
