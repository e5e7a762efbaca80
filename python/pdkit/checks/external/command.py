"""`pdkit check URL`: is a deployment that is already there right?"""

import contextlib
import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import requests

from pdkit.checks.accuracy.gsm8k import default_dataset_path
from pdkit.checks.external.checks import MIN_SCORE, CheckedDeployment, CheckRow, State, check_all, check_record
from pdkit.checks.external.record import Fingerprint, record_of
from pdkit.checks.http import RequestFailed
from pdkit.core.command import Parser, positive
from pdkit.core.errors import ExitCode, NotReady, UsageError
from pdkit.core.gsm8k import Dataset, DatasetError, read_dataset
from pdkit.core.loopback import past_proxies
from pdkit.core.paths import ASSETS
from pdkit.deployment.external import KEY_VARIABLE, Deployment, discover, is_monolithic, key_sent, probe

DATA_VARIABLE = "SGLANG_PD_GSM8K"
NANO_QUESTIONS = ASSETS / "gsm8k_nano.jsonl"
EVIDENCE_SHOWN = 10
NO_QUESTIONS = "not asked: the record is compared alone"


EPILOG = """\
Exit codes: 0 all that was checked is right, 1 something is wrong, 2 bad usage, 3 not a PD deployment, or no answer, \
5 right, but whether it is prefill and decode could not be confirmed, 6 drifted from the record"""


def add_arguments(parser: Parser) -> None:
    parser.add_argument("url", metavar="URL", help="load balancer or router, http://host:port without /v1")
    parser.add_argument(
        "--baseline", metavar="URL", help="a monolithic server of the same model: answers must be equal"
    )
    parser.add_argument(
        "--baseline-record", type=Path, metavar="FILE",
        help="only: does it answer as when FILE was made? 120 short requests",
    )  # fmt: skip
    parser.add_argument("--record", action="store_true", help="make that FILE: this deployment is known to be good")
    parser.add_argument(
        "--quick", action="store_true", help="fewer prompts and 40 questions, in a fraction of the time"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.add_argument(
        "--data", metavar="FILE", help=f"GSM8K questions, lines of JSON (default: {DATA_VARIABLE}, or a download)"
    )
    parser.add_argument("--model", metavar="NAME", help="what it must serve (default: whatever it serves)")
    parser.add_argument(
        "--min-score", type=positive, default=MIN_SCORE, metavar="X", help="GSM8K (default: %(default)s)"
    )
    parser.add_argument(
        "--prefill-urls", metavar="URL,...", help="its prefill servers, to count each request; nobody else may use them"
    )
    parser.add_argument("--decode-urls", metavar="URL,...", help="its decode servers, likewise")
    parser.add_argument(
        "--exact", action="store_true",
        help="requests alone are equal to the bit: same kernels, same kind of machine (default for pdkit's own engine)",
    )  # fmt: skip
    parser.add_argument("--api-key", metavar="KEY", help=f"default: {KEY_VARIABLE}, which other users do not see")


def main(args: Namespace) -> ExitCode:
    """Runs the checks and prints what they found. Raises UsageError and NotReady."""
    began = time.monotonic()
    deployment = Deployment.of(
        args.url, args.baseline, args.prefill_urls, args.decode_urls, args.model,
        args.api_key or os.environ.get(KEY_VARIABLE),
    )  # fmt: skip
    record = _record_of(args)
    questions = args.data or os.environ.get(DATA_VARIABLE)
    given = _questions(questions) if questions else None
    # servers of this machine are not asked through a proxy, whatever the environment says
    with mock.patch.dict(os.environ, past_proxies(os.environ)), key_sent(deployment):
        served = probe(deployment)
        servers = discover(deployment)
        if servers.problem:
            raise NotReady(f"{deployment.base_url} is not a PD deployment: {servers.problem}")
        if deployment.baseline_url and is_monolithic(deployment.baseline_url, deployment.api_key) is False:
            raise UsageError(
                f"--baseline {deployment.baseline_url}: is part of a PD deployment, name a monolithic server"
            )
        infos = (*servers.prefill, *servers.decode)
        version = next((info["version"] for info in infos if isinstance(info.get("version"), str)), None)
        exact = args.exact or (bool(infos) and all(map(_is_embedded, infos)))
        data = given or (NO_QUESTIONS if args.baseline_record else _default_questions(served.model_path))
        target = CheckedDeployment(deployment, served, servers, data, args.quick, exact, args.min_score)
        if args.record:
            return _write_record(target, version, args.baseline_record)
        if record and record.model != target.model:
            raise UsageError(
                f"{args.baseline_record} is of {record.model}, {deployment.base_url} serves {target.model}"
            )
        if not args.json:
            print(f"check of {deployment.base_url}, which serves {target.model}", flush=True)
        said = (lambda row: None) if args.json else _print
        rows = check_record(target, record, said) if record else check_all(target, said, watched=_shown)
    code = verdict(rows)
    seconds = time.monotonic() - began
    if args.json:
        report = {"url": deployment.base_url, "baseline": deployment.baseline_url, "model": target.model,
                  "verdict": code.name, "exit_code": int(code), "seconds": round(seconds, 1),
                  "checks": [asdict(row) for row in rows]}  # fmt: skip
        print(json.dumps(report, indent=2))
    else:
        print(f"{code.name}: {MEANINGS[code]}, in {seconds:.0f} s", flush=True)
    return code


MEANINGS = {
    ExitCode.PASSED: "all that was checked is right",
    ExitCode.FAILED: "something is wrong, see FAILED above",
    ExitCode.DRIFTED: "the answers are no longer those of the record, see DRIFTED above",
    ExitCode.UNCONFIRMED: "all that was checked is right, but not whether this is prefill and decode",
}


def _record_of(args: Namespace) -> Fingerprint | None:
    """What to compare with; None where nothing was recorded, or is to be now. Raises UsageError and NotReady."""
    path = args.baseline_record
    if args.record and path is None:
        raise UsageError("--record: name the file by --baseline-record FILE")
    if path is None or not args.record:
        return path and Fingerprint.read(path)
    if path.exists():
        raise UsageError(f"--record: {path} is there already; remove it first, or name another file")
    return None


def _write_record(target: CheckedDeployment, version: str | None, path: Path) -> ExitCode:
    try:
        record = record_of(target.url, target.model, version, target.timeout)
    except (RequestFailed, requests.RequestException) as failure:
        raise NotReady(f"{target.url} cannot be recorded: {failure}") from None
    record.write(path)
    print(f"recorded: {path}, what {target.url} answers to {len(record.texts)} prompts", flush=True)
    return ExitCode.PASSED


def verdict(rows: Sequence[CheckRow]) -> ExitCode:
    """FAILED, or else DRIFTED, by any row; UNCONFIRMED where the first, the servers' roles, could not be checked."""
    if any(row.state is State.FAILED for row in rows):
        return ExitCode.FAILED
    if any(row.state is State.DRIFTED for row in rows):
        return ExitCode.DRIFTED
    return ExitCode.PASSED if rows[0].state is State.PASSED else ExitCode.UNCONFIRMED


def _print(row: CheckRow) -> None:
    shown = [f"    {line.strip()}" for line in row.evidence[:EVIDENCE_SHOWN]]
    if len(row.evidence) > EVIDENCE_SHOWN:
        shown.append(f"    and {len(row.evidence) - EVIDENCE_SHOWN} more: --json has them all")
    print(row.line(), *shown, sep="\n", flush=True)


def _shown(name: str) -> AbstractContextManager[object]:
    """While a check runs, its name on a terminal."""
    if not sys.stderr.isatty():
        return contextlib.nullcontext()
    from rich.console import Console

    return Console(stderr=True).status(f"{name} ...")


def _questions(path: str) -> Dataset:
    try:
        return read_dataset(path)
    except DatasetError as error:
        raise NotReady(str(error)) from None


def _default_questions(model_path: str) -> Dataset | str:
    """GSM8K, or what our nano models were trained for; a text says why there are none."""
    is_nano = (Path(model_path) / "training.json").is_file()
    try:
        return read_dataset(NANO_QUESTIONS if is_nano else default_dataset_path())
    except DatasetError as error:
        return f"{error} by --data FILE" if "name a file" in str(error) else str(error)


def _is_embedded(info: Mapping[str, Any]) -> bool:
    """Whether a server is pdkit's own engine, whose lone answers are the same to the bit wherever they are computed."""
    engine = info.get("engine")
    return isinstance(engine, dict) and engine.get("name") == "pdkit.engine"
