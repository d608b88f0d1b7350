"""What a configuration says of the storages; light, and without what they are made of."""

from __future__ import annotations

from pydantic import Field

from trigger.config.sections import StorageOptions


class DirectoryOptions(StorageOptions):
    """Copies what changed, on any filesystem; a volume is any directory."""

    paranoid: bool = False
    """Compare the content of every file instead of trusting time stamps."""


class BtrfsOptions(StorageOptions):
    """Cuts atomically and at once; a volume is a subvolume, and `folder` lies on the btrfs of all of them."""

    paranoid: bool = Field(default=False, deprecated="nothing is compared here")
    """Of no effect; read because it was allowed here once."""
