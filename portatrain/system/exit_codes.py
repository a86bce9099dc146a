"""The exit codes of every command and of every process of a run.

Schedulers read them: a job that ends with RESUMABLE is started again, one that ends with MISTAKE is not.
"""

from __future__ import annotations

from portatrain.errors import MachineError, StorageError, UserError

OK = 0
"""Done."""
FAILED = MachineError.code
"""A bug of portatrain, or a failure of the machine (1): a traceback was printed, or a paragraph that names the device
(`recipe.Referee`), and a job tries again."""
FOUND = 1
"""A command that checks or compares has found something (`check`, `ckpt verify`, `ckpt diff`); it is printed."""
MISTAKE = UserError.code
"""A user's mistake, also one in a user's own code (2): one paragraph was printed, and a retry would fail too."""
STORAGE = StorageError.code
"""Storage failed during the run (75): a retry may succeed."""
RESUMABLE = 85
"""Stopped and saved: the run can be resumed."""
INTERRUPTED = 130
"""Ended by Ctrl-C."""
NOT_FAILURES = (OK, RESUMABLE, INTERRUPTED)
"""Exit codes that need no error report; the other processes of the run may continue for a moment."""
