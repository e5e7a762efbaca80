"""The base of what is put before a `PlannedServers`: one to a type checker, nothing at run time."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pdkit.deployment.fixture import PlannedServers

    BeforePlannedServers = PlannedServers
else:
    BeforePlannedServers = object  # modules of checks that need only HTTP import no SGLang

__all__ = ["BeforePlannedServers"]
