"""What a configuration says of the agents of hosts; light, and without what they are made of."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from trigger.config.sections import AgentOptions, WholePath


class LocalOptions(AgentOptions):
    """The host that the service itself runs on."""

    hooks: WholePath | None = Field(default=None, examples=["/etc/trigpoint/hooks.toml"])
    """A root-owned TOML file that names programs to run before or after the flush."""

    @property
    def guarded_files(self) -> tuple[Path, ...]:
        """The file of the hooks, which says what is run."""
        return (self.hooks,) if self.hooks else ()
