"""Processes that tokenise documents for `packing.py`, and the same without processes.

A process gets documents through its standard input and answers through its standard output. It ends when its input
ends, so it does not outlive the process that packs, however that is killed.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from portatrain.errors import StorageError, UserError
from portatrain.system.text import counted

Raw = tuple[bytes, str]
"""The bytes of a document, and where it is."""


class Encoders(Protocol):
    """depth: how many calls of `encode` may wait for their results."""

    depth: int

    def encode(self, documents: Sequence[Raw]) -> Future[list[np.ndarray]]: ...

    def close(self) -> None: ...


class Processes:
    """`count` processes with one tokenizer. A process that ends on its own is started again, once for each call."""

    def __init__(self, tokenizer: str, bos: str | None, count: int) -> None:
        self.depth = 2 * count + 2
        self._given = (tokenizer, bos)
        self._free: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._all = [_Process(self._given) for _ in range(count)]
        for process in self._all:
            self._free.put(process)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="portatrain-encode")

    def encode(self, documents: Sequence[Raw]) -> Future[list[np.ndarray]]:
        return self._threads.submit(self._encode, documents)

    def _encode(self, documents: Sequence[Raw]) -> list[np.ndarray]:
        process = self._free.get()
        try:
            try:
                return process.encode(documents)
            except (EOFError, BrokenPipeError, pickle.UnpicklingError):
                process.start()
            try:
                return process.encode(documents)
            except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
                size = sum(len(data) for data, _ in documents)
                raise StorageError(
                    "the processes that tokenise",
                    expected="answers",
                    got=f"one that ended twice ({process.ending()}) on {counted(len(documents), 'documents')} "
                    f"of {size} bytes, from {documents[0][1]}",
                    do="It may have had too little memory: use fewer --workers, and give the same command again.",
                ) from error
        finally:
            self._free.put(process)

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        for process in self._all:
            process.close()


class _Process:
    def __init__(self, given: tuple[str, str | None]) -> None:
        self._given = given
        self._child: Any = None
        self.start()

    def start(self) -> None:
        if self._child is not None:
            self.close()
        package = str(Path(__file__).parents[3])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}
        self._child = subprocess.Popen(
            [sys.executable, "-m", "portatrain.data.store.encoders"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
        )
        with contextlib.suppress(BrokenPipeError):
            self._send(self._given)

    def _send(self, what: object) -> None:
        pickle.dump(what, self._child.stdin, protocol=5)
        self._child.stdin.flush()

    def encode(self, documents: Sequence[Raw]) -> list[np.ndarray]:
        """Raises EOFError or BrokenPipeError if the process has ended."""
        self._send(list(documents))
        kind, answer = pickle.load(self._child.stdout)
        if kind == "mistake":
            what, expected, got, do = answer
            raise UserError(what, expected=expected, got=got, do=do)
        ids, lengths = answer
        return np.split(np.frombuffer(ids, np.uint32), np.cumsum(lengths)[:-1])

    def ending(self) -> str:
        code = self._child.wait()
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()
        self._child.stdout.close()
        self._child.wait()


def serve() -> None:
    """Answer until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that packs decides
    from portatrain.data.encode import Tokenized

    reader, writer = sys.stdin.buffer, sys.stdout.buffer
    encode: Tokenized | None = None
    while True:
        try:
            given = pickle.load(reader)
        except EOFError:
            return
        if encode is None:
            encode = Tokenized(*given)
            continue
        try:
            found = encode.many(given)
            answer: tuple[str, Any] = ("ids", (np.concatenate(found).tobytes(), [len(one) for one in found]))
        except UserError as error:
            answer = ("mistake", (error.what, error.expected, error.got, error.do))
        try:
            pickle.dump(answer, writer, protocol=5)
            writer.flush()
        except BrokenPipeError:
            os._exit(1)


if __name__ == "__main__":
    serve()
