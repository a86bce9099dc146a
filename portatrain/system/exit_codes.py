"""The exit codes of every command and of every process of a run.

Schedulers read them: a job that ends with RESUMABLE is started again, one that ends with MISTAKE is not.
"""

from __future__ import annotations

from portatrain.errors import StorageError, UserError

OK = 0
"""Done."""
FAILED = 1
"""A bug of ours, or of the code of a recipe: a traceback was printed."""
MISTAKE = UserError.code
"""A user's mistake (2): one paragraph was printed, and another try would end the same way."""
STORAGE = StorageError.code
"""Storage failed while it was used (75): another try may succeed."""
RESUMABLE = 85
"""Stopped and saved: the run is to be resumed."""
INTERRUPTED = 130
"""Ended by Ctrl-C."""
NOT_FAILURES = (OK, RESUMABLE, INTERRUPTED)
"""Ends that need no explanation; the other processes of the run may go on for a moment."""
