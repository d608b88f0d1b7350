"""By which catalog a service is known, to whom something on this host or in a server was claimed."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def is_anothers(noted: str, holder: str) -> bool:
    """Whether what was noted for one catalog is another's than `holder`, and still claimed: that catalog is there.

    One that was moved, or was lost, claims nothing more; one that lies where we may not look counts as there.
    """
    if not (noted and holder) or noted == holder:
        return False
    try:
        os.stat(noted)  # noqa: PTH116 - of a path that may hold anything
    except PermissionError:
        return True
    except OSError:
        return False
    with contextlib.suppress(OSError):
        return not Path(noted).samefile(holder)
    return True
