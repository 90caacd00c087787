"""What a job asks for when it is tried again, as a profile's ``retries`` has it.

Each attempt asks for twice the memory and time of the one before. A failure that neither changes (a wrong setting, an
error in somebody's code) is told from its log, and the job that would try it again ends at once, before it computes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PASSING = re.compile(
    r"no memory left|MemoryError|OutOfMemory|out of memory|can't allocate memory"  # more memory
    r"|stopped|interrupted|SystemExit|KeyboardInterrupt"  # a time limit, a node that is taken away
    r"|cannot be written|mend that and run|was taken over|OSError|ConnectionError|TimeoutError"  # another node
    r"|CUDA error|has \d+ GPUs"
)
"""What the last line of a log says of a failure that another attempt may be spared."""


def growing(base: int, log: str = "", *, in_job: bool) -> Callable[[Any, int], int]:
    """A resource of a rule: ``base``, doubled with each attempt.

    ``in_job`` is true in the Snakemake that a cluster's job runs. There, if the attempt before failed for good by its
    ``log`` (the rule's, with its wildcards), the job ends with one line.
    """

    def resource(wildcards: Any, attempt: int) -> int:
        if log and in_job and attempt > 1:
            try:
                text = Path(log.format(**dict(wildcards.items()))).read_text("utf-8", "replace")
            except OSError:
                text = ""
            if why := lasting(text):
                sys.exit(f"not tried again, as neither time nor memory would change it: {why}")
        return int(base * 2 ** (attempt - 1))

    return resource


def lasting(log: str) -> str:
    """The last line of a log if it tells of a failure that more time or memory would not change, else nothing.

    A job that was killed says nothing at its end.
    """
    lines = [line for line in log.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    own_words = re.match(r"curvspace [a-z]+: ", last)
    raised = any(line.startswith("Traceback (most recent call last)") for line in lines)
    raised = raised and re.match(r"[A-Za-z_][\w.]*(: |$)", last) is not None
    return last if (own_words or raised) and not PASSING.search(last) else ""
