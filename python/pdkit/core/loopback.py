"""A machine's traffic with itself: through no proxy, whatever the environment says, and over IPv4."""

from collections.abc import Mapping

ADDRESSES = "127.0.0.1,localhost,::1"
PROXIES = ("http_proxy", "https_proxy", "all_proxy")
EXCEPTIONS = ("no_proxy", "NO_PROXY")


def past_proxies(environ: Mapping[str, str]) -> dict[str, str]:
    """What `environ` needs more so that clients do not ask its proxies for loopback addresses; {} where it names none.

    Clients differ in which of the two spellings they prefer, so both get the same list.
    """
    if not any(environ.get(name) or environ.get(name.upper()) for name in PROXIES):
        return {}
    named = next(filter(None, map(environ.get, EXCEPTIONS)), "")
    rest = [each for each in ADDRESSES.split(",") if each not in map(str.strip, named.split(","))]
    return dict.fromkeys(EXCEPTIONS, ",".join(filter(None, [named, *rest])))
