"""What a check needs of the class that it is put into, verified when that class is created."""

import inspect
import os
import tempfile
import unittest
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pdkit.deployment.mixin import BeforePlannedServers

# Who provides what no plain deployment of one prefill and one decode server has.
PROVIDERS = {
    "monolithic_url": "MonolithicBeside",
    "process_monolithic": "MonolithicBeside",
    "router_url": "RustRouterBeside",
    "launch_router": "RustRouterBeside",
    "routers": "Fleet",
    "prefills": "Fleet",
    "names": "Fleet",
    "prefill_2_url": "TwoPairs",
    "decode_2_url": "TwoPairs",
    "require_training": "OneGpuServers",
}


if TYPE_CHECKING:

    class _Provided(BeforePlannedServers):
        """To a type checker: what only some deployments provide; `needs` says who asks for it."""

        monolithic_url: str
        router_url: str
        launch_router: Any
        backend: str

else:
    _Provided = BeforePlannedServers


class Checks(_Provided):
    """Base of all checks, and of what changes for them how servers are launched.

    needs  names that the test class must provide beside what a TestCase has: as an attribute or method, or, where it
           is known only once servers are launched, as an annotation (`lb_url: str`). They add up along the bases.

    A class that is a TestCase as well and lacks one is not created: TypeError names the class, the check and what is
    missing.
    """

    needs: tuple[str, ...] = ()

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        created: type = cls
        if issubclass(created, unittest.TestCase) and (problems := list(_lacking(created))):
            raise TypeError("; ".join(problems))

    @classmethod
    def temporary_path(cls, prefix: str, name: str) -> str:
        """Path for a file of a test class, in a new directory that goes when the class is done."""
        directory = tempfile.TemporaryDirectory(prefix=prefix)
        cls.addClassCleanup(directory.cleanup)
        return os.path.join(directory.name, name)


def _lacking(cls: type) -> Iterator[str]:
    """One text for each check in `cls` whose needs are not met."""
    announced = {name for base in cls.__mro__ for name in inspect.get_annotations(base)}
    for check in cls.__mro__:
        needs = vars(check).get("needs", ()) if issubclass(check, Checks) else ()
        missing = [name for name in needs if name not in announced and not hasattr(cls, name)]
        if missing:
            provider = next((PROVIDERS[name] for name in missing if name in PROVIDERS), "PDServers")
            yield (
                f"{cls.__name__}: {check.__name__} needs {', '.join(missing)}; put a deployment that provides "
                f"{'it' if len(missing) == 1 else 'them'}, such as {provider}, among the bases"
            )
