"""Submit the jobs of a new or resumed run, and undo the submission if one of them is refused."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Sequence
from dataclasses import replace

from launchers.base import Job, launcher
from portatrain.errors import UserError
from portatrain.recipe import Recipe
from portatrain.runs.code_snapshot import pack
from portatrain.runs.run_dir import RunDir


def submit(run: RunDir, recipe: Recipe, jobs: Sequence[Job], *, code: str | None = None) -> list[Job]:
    """Write the run's record and submit every job, in order; return the jobs with their ids.

    `code`: the run's existing copy of the code; None: copy the code of this process. If one job is refused, those that
    were already submitted are cancelled, so that no scheduler keeps any of them.
    """
    run.create(recipe)
    source = jobs[0].recipe
    if code is None:
        folder, source = pack(run.path.absolute(), jobs[0].recipe)
        code = run.share_code(folder)
        source = source.replace(str(folder), code, 1)
    together = secrets.token_hex(8)
    written = [
        replace(job, code=code, recipe=source, source=job.source or job.recipe, submission=together).write()
        for job in jobs
    ]
    handed: list[Job] = []
    for job in written:
        try:
            answer = launcher(job.engine).submit(job)
        except BaseException:
            for other in handed:
                try:
                    launcher(other.engine).cancel(other)
                except UserError as error:
                    print(f"job {other.number} ({other.id}) could not be taken back: {error}", file=sys.stderr)
            for other in written:
                other.forget()
            raise
        handed.append(job.submitted(answer))
        print(f"submitted        job {job.number}: {job.engine} {answer} on {job.cluster}")
    return handed
