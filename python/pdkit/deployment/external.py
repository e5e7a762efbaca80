"""A deployment that somebody else runs: where it is, the key to it, and what serves there. It needs HTTP only."""

import contextlib
import json
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

import requests

from pdkit.core.errors import NotReady, UsageError
from pdkit.core.secrets import cleaned

CONNECT_S, ANSWER_S = 5, 10
KEY_VARIABLE = "SGLANG_PD_API_KEY"
NEEDED = "needed is SGLang's router or load balancer, with /v1/models, /v1/completions and /generate"
PREFILL, DECODE = "prefill", "decode"
ROUTER = "the router reports"


def _url(option: str, text: str) -> str:
    url = text.rstrip("/")
    if any(sign in url for sign in "@?#"):
        raise UsageError(f"{option}: no credentials in a URL, they reach logs; put the key into {KEY_VARIABLE}")
    try:
        parts = urlsplit(url)
        well_formed = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
        requests.Request("GET", url).prepare()  # its InvalidURL is a ValueError
    except ValueError:
        well_formed = False
    if not well_formed:
        raise UsageError(f"{option}: {text} is not a URL like http://host:port or http://host:port/prefix")
    if parts.path.endswith("/v1"):
        raise UsageError(f"{option}: leave /v1 of {text} away, other paths are asked, too")
    return url


def _place(url: str) -> tuple[str, int | None, str]:
    """Who listens at a URL, however its host is written: address, port, path."""
    parts = urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    try:
        host = min(str(found[4][0]) for found in socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM))
    except OSError:
        host = str(parts.hostname)
    return "127.0.0.1" if host == "::1" else host, port, parts.path


@dataclass(frozen=True)
class Deployment:
    """What the command line names; URLs have no slash at the end.

    base_url      load balancer, http://host:port without /v1
    baseline_url  a monolithic server of the same model to compare with
    prefill_urls  prefill and decode servers whose counters are read to the last request; nobody else may use them
    decode_urls   meanwhile
    model         name that it must serve (default: whichever it serves)
    api_key       sent to these URLs as a bearer token, nowhere else
    """

    base_url: str
    baseline_url: str | None = None
    prefill_urls: tuple[str, ...] = ()
    decode_urls: tuple[str, ...] = ()
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls,
        base_url: str,
        baseline_url: str | None = None,
        prefill_urls: str | None = None,
        decode_urls: str | None = None,
        model: str | None = None,
        api_key: str | None = None,
    ) -> "Deployment":
        """From texts as users write them, those of several URLs separated by commas. Raises UsageError: one line."""
        base = _url("URL", base_url)
        baseline = _url("--baseline", baseline_url) if baseline_url else None
        prefill, decode = (
            tuple(_url(option, url.strip()) for url in (text or "").split(",") if url.strip())
            for option, text in (("--prefill-urls", prefill_urls), ("--decode-urls", decode_urls))
        )
        if bool(prefill) != bool(decode):
            raise UsageError("prefill and decode servers are counted against each other: name both kinds, or none")
        if api_key and not (api_key.isascii() and api_key.isprintable() and api_key == api_key.strip()):
            raise UsageError(f"{KEY_VARIABLE}: has spaces or characters that no HTTP header can carry")
        found = cls(base, baseline, prefill, decode, model, api_key or None)
        places: dict[tuple[str, int | None, str], str] = {}
        for url in found.urls:
            if (place := _place(url)) in places:
                raise UsageError(f"{places[place]} and {url} are the same server: each address is to be another one's")
            places[place] = url
        return found

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.base_url, self.baseline_url, *self.prefill_urls, *self.decode_urls)))


@dataclass(frozen=True)
class Served:
    """What a server or load balancer reports of itself: its models' names, and the directory or repository it loaded."""

    names: tuple[str, ...]
    model_path: str


def _get(url: str, key: str | None) -> tuple[int, Any]:
    """(status, JSON or None where it is none; the first of its text where the status is not 200)."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = requests.get(url, headers=headers, timeout=(CONNECT_S, ANSWER_S), allow_redirects=False)
        content = answer.content
    except requests.Timeout:
        raise NotReady(f"{url}: no answer within {ANSWER_S} s") from None
    except requests.exceptions.SSLError as error:
        reason = _root(error)
        if "WRONG_VERSION_NUMBER" in reason or "record layer failure" in reason:
            raise NotReady(f"{url}: this port speaks plain HTTP; write http:// instead of https://") from None
        raise NotReady(f"{url}: TLS: {reason}") from None
    except requests.ConnectionError as error:
        raise NotReady(f"{url}: cannot be reached: {_root(error)}") from None
    except requests.RequestException as error:
        raise NotReady(f"{url}: does not answer in proper HTTP: {_root(error)}") from None
    if answer.status_code in (401, 403):
        hint = "does not accept the key in" if key else "wants a key: set"
        raise NotReady(f"{url}: status {answer.status_code}, it {hint} {KEY_VARIABLE}")
    if answer.status_code != 200:
        text = " ".join(content.decode("utf-8", "replace").split())
        return answer.status_code, cleaned(text, {"API_KEY": key or ""})[:120]
    try:
        return 200, answer.json()
    except ValueError:
        return 200, None


def _root(error: BaseException) -> str:
    """Where it began; urllib3 keeps causes as `reason` or among the arguments, too."""
    causes = (error.__cause__, error.__context__, getattr(error, "reason", None), *error.args)
    if cause := next((each for each in causes if isinstance(each, BaseException)), None):
        return _root(cause)
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:200] or type(error).__name__


def ask(url: str, key: str | None = None) -> Served:
    """Who is at `url`? Raises NotReady where nobody is, or not an SGLang server and not a load balancer of such."""
    status, answer = _get(f"{url}/v1/models", key)
    if status == 404:
        raise NotReady(f"{url} is not an SGLang server: it has no /v1/models; {NEEDED}")
    if status != 200:
        raise NotReady(f"{url}/v1/models: status {status}: {answer}")
    try:
        names = tuple(model["id"] for model in answer["data"])
    except (TypeError, KeyError):
        names = ()
    if not names or not all(isinstance(name, str) for name in names):
        raise NotReady(f"{url} is not an SGLang server: /v1/models names no model; {NEEDED}")
    for path in ("model_info", "get_model_info"):
        status, answer = _get(f"{url}/{path}", key)
        if status == 200 and isinstance(answer, dict) and isinstance(answer.get("model_path"), str):
            return Served(names, answer["model_path"])
    raise NotReady(
        f"{url} serves {', '.join(names)}, but is not an SGLang server: no /model_info that names a model_path; {NEEDED}"
    )


def probe(deployment: Deployment) -> Served:
    """What the deployment serves. Raises NotReady where a URL is not what it should be, UsageError for another model."""
    served = [ask(url, deployment.api_key) for url in deployment.urls]
    wanted = deployment.model
    for url, each in zip(deployment.urls, served):
        if wanted and wanted not in (*each.names, each.model_path):
            raise UsageError(f"{url} serves {', '.join(each.names)}, not {wanted} (--model)")
    return served[0]


@contextlib.contextmanager
def key_sent(deployment: Deployment) -> Iterator[None]:
    """Within it, this process sends the key with each request to the deployment, and to nobody else."""
    origins = {urlsplit(requests.Request("GET", url).prepare().url or "")[:2] for url in deployment.urls}
    send = requests.Session.send

    def send_with_key(session: requests.Session, request: requests.PreparedRequest, **options: Any) -> Any:
        if deployment.api_key and urlsplit(request.url or "")[:2] in origins:
            request.headers["Authorization"] = f"Bearer {deployment.api_key}"
        return send(session, request, **options)

    with mock.patch.object(requests.Session, "send", send_with_key):
        yield


@dataclass(frozen=True)
class Servers:
    """The servers behind a load balancer, as far as they can be seen.

    source   where that is known from, in words; None: nowhere
    prefill  what each prefill server reports of itself; an empty mapping where it is only known that it is there
    decode   the same of the decode servers
    exact    they were named on the command line: nobody else uses them
    """

    source: str | None
    prefill: tuple[Mapping[str, Any], ...] = ()
    decode: tuple[Mapping[str, Any], ...] = ()
    exact: bool = False

    @property
    def is_rust_router(self) -> bool:
        """SGLang's router, which lists its workers; its mini load balancer reports their /server_info."""
        return self.source == ROUTER

    @property
    def problem(self) -> str | None:
        """Why this is not prefill and decode, or None."""
        if self.source is None:
            return None
        for role, infos in ((PREFILL, self.prefill), (DECODE, self.decode)):
            if not infos:
                return f"{self.source} no {role} server"
            for info in infos:
                mode = info.get("disaggregation_mode")
                if "disaggregation_mode" in info and mode != role:
                    return f"a server that {self.source} as {role} has disaggregation_mode {mode or 'null'}"
        return None

    @property
    def confirmed(self) -> bool:
        """Each server itself, or the router that asked it, reports its role."""
        infos = (*self.prefill, *self.decode)
        return self.source is not None and self.problem is None and all("disaggregation_mode" in i for i in infos)


def discover(deployment: Deployment) -> Servers:
    """The servers of a deployment: those that were named, or those that its load balancer or router reports."""
    base, key = deployment.base_url, deployment.api_key
    if deployment.prefill_urls:
        prefill, decode = (
            tuple(server_info(url, key) or {} for url in urls)
            for urls in (deployment.prefill_urls, deployment.decode_urls)
        )
        return Servers("the command line names", prefill, decode, exact=True)
    balancer = server_info(base, key)
    if balancer is not None and _are_infos(balancer.get("prefill")) and _are_infos(balancer.get("decode")):
        return Servers("the load balancer reports", tuple(balancer["prefill"]), tuple(balancer["decode"]))
    if balancer is not None and "disaggregation_mode" in balancer:
        mode = balancer["disaggregation_mode"]
        alone = "a monolithic server" if mode in (None, "null") else f"one {mode} server without its load balancer"
        raise NotReady(f"{base} is not a PD deployment: it is {alone} (/server_info: disaggregation_mode {mode})")
    workers = _workers(base, key)
    if workers is not None:
        prefill, decode = (
            tuple(_info_of(worker) for worker in workers if worker.get("worker_type") == role)
            for role in (PREFILL, DECODE)
        )
        return Servers(ROUTER, prefill, decode)
    return Servers(None)


def is_monolithic(url: str, key: str | None) -> bool | None:
    """Whether a server computes prompts and decodes; None where it does not report what it does."""
    info = server_info(url, key)
    if info is None or "disaggregation_mode" not in info:
        return False if _workers(url, key) or (info and "decode" in info) else None
    return info["disaggregation_mode"] in (None, "null")


def server_info(url: str, key: str | None = None) -> Mapping[str, Any] | None:
    """What a server or SGLang's mini load balancer reports of itself; None where it reports nothing."""
    for path in ("server_info", "get_server_info"):
        with contextlib.suppress(NotReady):
            status, answer = _get(f"{url}/{path}", key)
            if status == 200 and isinstance(answer, dict):
                return answer
    return None


def _are_infos(found: Any) -> bool:
    return isinstance(found, list) and all(isinstance(each, dict) for each in found)


def _workers(base: str, key: str | None) -> Sequence[Mapping[str, Any]] | None:
    with contextlib.suppress(NotReady):
        status, answer = _get(f"{base}/workers", key)
        if status == 200 and isinstance(answer, dict) and _are_infos(answer.get("workers")):
            return answer["workers"]
    return None


def _info_of(worker: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a worker itself reports, if it lets us (without the key: it was not named); else what the router knows."""
    known = worker.get("metadata") or {}
    url = worker.get("url")
    own = server_info(url) if isinstance(url, str) and url.startswith("http") else None
    return {**known, **(own or {})}


def geometry_config(model_path: str) -> Mapping[str, Any] | None:
    """config.json of a model in a directory that can be read here; None otherwise."""
    try:
        with open(f"{model_path}/config.json", encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "vocab_size" in found else None
