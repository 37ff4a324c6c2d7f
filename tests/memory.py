"""Memory of this process in MiB: what it holds, and the most that it held.

``ru_maxrss`` of a process that Python started begins with what its parent held, so it is read only where ``/proc``
does not tell.
"""

import contextlib
import resource
import sys
from pathlib import Path


def held_mib():
    return _status("VmRSS")


def peak_mib(*, anew=False):
    """``anew``: from now on, where the system can forget what was before."""
    if anew:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    return _status("VmHWM")


def _status(name):
    with contextlib.suppress(OSError, IndexError):  # no such file, or no such line in it
        return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)
