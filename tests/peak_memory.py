"""Peak of the resident memory of this process."""

import pathlib
import re


def peak_bytes() -> int:
    """The most memory that this program has held, as Linux counts it.

    Not `getrusage`, whose peak is that of the process before it became this program: a small child
    of a large test process would be told as large.
    """
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)[1])
