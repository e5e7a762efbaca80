"""A deployment that somebody else runs: where it is, whether it is what it is said to be, and the key to it.

SGLANG_PD_BASE_URL      load balancer, http://host:port without /v1
SGLANG_PD_BASELINE_URL  a monolithic server of the same model to compare with, or none
SGLANG_PD_PREFILL_URLS  prefill and decode servers whose counters are read, separated by commas; nobody else may
SGLANG_PD_DECODE_URLS   use them meanwhile
SGLANG_PD_MODEL         name that it must serve (default: whichever it serves)
SGLANG_PD_TOKENIZER     config and tokenizer of its model, for parity (default: what it says it loaded)
SGLANG_PD_API_KEY       sent to these URLs as a bearer token, nowhere else; kept out of logs (`pdkit.core.secrets`)
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from urllib.parse import urlsplit

import requests

from pdkit.core.errors import NotReady, UsageError
from pdkit.core.secrets import cleaned

CONNECT_S, ANSWER_S = 5, 10


def _url(field_name: str, text: str) -> str:
    name = f"--{field_name.replace('_', '-')} or {variable(field_name)}"
    url = text.rstrip("/")
    if any(sign in url for sign in "@?#"):
        raise UsageError(f"{name}: no credentials in a URL, they reach logs; put the key into SGLANG_PD_API_KEY")
    try:
        parts = urlsplit(url)
        well_formed = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
        requests.Request("GET", url).prepare()  # its InvalidURL is a ValueError
    except ValueError:
        well_formed = False
    if not well_formed:
        raise UsageError(f"{name}: {text} is no URL like http://host:port")
    if parts.path.endswith("/v1"):
        raise UsageError(f"{name}: leave /v1 of {text} away, other paths are asked, too")
    return url


@dataclass(frozen=True)
class Deployment:
    """What the environment says; see the module. URLs have no slash at the end."""

    base_url: str
    baseline_url: str | None = None
    prefill_urls: tuple[str, ...] = ()
    decode_urls: tuple[str, ...] = ()
    model: str | None = None
    tokenizer: str | None = None
    api_key: str | None = field(default=None, repr=False)

    @classmethod
    def of(cls, environ: Mapping[str, str] = os.environ) -> "Deployment":
        """Raises UsageError, whose message is one line."""
        given = {each.name: environ.get(variable(each.name)) or None for each in fields(cls)}
        if not given["base_url"]:
            raise UsageError(f"--base-url or {variable('base_url')}: which deployment?")
        for name in ("base_url", "baseline_url"):
            given[name] = given[name] and _url(name, given[name])
        for name in ("prefill_urls", "decode_urls"):
            urls = (url.strip() for url in (given[name] or "").split(","))
            given[name] = tuple(_url(name, url) for url in urls if url)
        if bool(given["prefill_urls"]) != bool(given["decode_urls"]):
            raise UsageError("prefill and decode servers are counted against each other: name both kinds, or none")
        key = given["api_key"]
        if key and not (key.isascii() and key.isprintable() and key == key.strip()):
            raise UsageError(f"{variable('api_key')}: has spaces or characters that no HTTP header can carry")
        return cls(**given)

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.base_url, self.baseline_url, *self.prefill_urls, *self.decode_urls)))


def variable(name: str) -> str:
    """The environment variable of a field of Deployment."""
    return f"SGLANG_PD_{name.upper()}"


@dataclass(frozen=True)
class Served:
    """What a server or load balancer says of itself: names of its models, and the directory or repository it loaded."""

    names: tuple[str, ...]
    model_path: str


def _get(url: str, key: str | None):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = requests.get(url, headers=headers, timeout=(CONNECT_S, ANSWER_S), allow_redirects=False)
        content = answer.content
    except requests.Timeout:
        raise NotReady(f"{url}: no answer within {ANSWER_S} s") from None
    except requests.exceptions.SSLError as error:
        raise NotReady(f"{url}: TLS: {_root(error)}") from None
    except requests.ConnectionError as error:
        raise NotReady(f"{url}: cannot be reached: {_root(error)}") from None
    except requests.RequestException as error:
        raise NotReady(f"{url}: answers no proper HTTP: {_root(error)}") from None
    if answer.status_code in (401, 403):
        hint = "does not accept the key in" if key else "wants a key: set"
        raise NotReady(f"{url}: status {answer.status_code}, it {hint} {variable('api_key')}")
    if answer.status_code != 200:
        text = " ".join(content.decode("utf-8", "replace").split())
        return answer.status_code, cleaned(text, {"API_KEY": key or ""})[:120]
    try:
        return 200, answer.json()
    except ValueError:
        return 200, None


def _root(error: BaseException) -> str:
    while isinstance(inner := error.__cause__ or error.__context__ or _reason(error), BaseException):
        error = inner
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:200] or type(error).__name__


def _reason(error: BaseException):
    """urllib3 keeps causes as `reason` or among the arguments."""
    return getattr(error, "reason", None) or next((a for a in error.args if isinstance(a, BaseException)), None)


def ask(url: str, key: str | None = None) -> Served:
    """Who is at `url`? Raises NotReady where nobody is, or no SGLang server and no load balancer of such."""
    status, answer = _get(f"{url}/v1/models", key)
    if status != 200:
        raise NotReady(f"{url}/v1/models: status {status}: {answer}")
    try:
        names = tuple(model["id"] for model in answer["data"])
    except (TypeError, KeyError):
        names = ()
    if not names or not all(isinstance(name, str) for name in names):
        raise NotReady(f"{url} is no SGLang server: /v1/models names no model")
    for path in ("model_info", "get_model_info"):
        status, answer = _get(f"{url}/{path}", key)
        if status == 200 and isinstance(answer, dict) and isinstance(answer.get("model_path"), str):
            return Served(names, answer["model_path"])
    raise NotReady(f"{url} serves {', '.join(names)}, but is no SGLang server: no /model_info that names a model_path")


def probe(deployment: Deployment) -> Served:
    """What the deployment serves. Raises NotReady where a URL is not what it should be, UsageError for another model."""
    served = [ask(url, deployment.api_key) for url in deployment.urls]
    wanted = deployment.model
    for url, each in zip(deployment.urls, served):
        if wanted and wanted not in (*each.names, each.model_path):
            raise UsageError(f"{url} serves {', '.join(each.names)}, not {wanted} ({variable('model')})")
    return served[0]


def send_key(deployment: Deployment) -> None:
    """From now on, this process sends the key with each request to the deployment, and to nobody else."""
    if not deployment.api_key:
        return
    os.environ["OPENAI_API_KEY"] = deployment.api_key
    origins = {urlsplit(requests.Request("GET", url).prepare().url)[:2] for url in deployment.urls}
    send = requests.Session.send

    def send_with_key(session, request, **options):
        if urlsplit(request.url)[:2] in origins:
            request.headers["Authorization"] = f"Bearer {deployment.api_key}"
        return send(session, request, **options)

    requests.Session.send = send_with_key
