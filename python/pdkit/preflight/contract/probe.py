"""Answers for one release of SGLang, in a process of its own: `python -m pdkit.preflight.contract.probe REQUEST ANSWER...`.

REQUEST is a JSON file (`root`, `version`, `tests`, `extra_argv`, `extra_env`, `real_imports`), ANSWER the JSON file to
write for each of `tests`, which is a test file or null. Each is imported in a fork of the process that has executed the
release. Test files and SGLang may print what they like.
"""

import gc
import importlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from pdkit.core.errors import NotReady
from pdkit.preflight.contract import environment, flags, kv_checksum, recording, settings
from pdkit.preflight.contract.launches import remark_as_data
from pdkit.preflight.contract.stand_ins import Importer, is_stand_in

SERVER, ROUTER = "sglang.launch_server", recording.ROUTER
SERVERS = SERVER, "pdkit.faults.real_engine.server"  # the latter hands its arguments on
MODEL = ["--model-path", "dummy"]


class Unreadable(Exception):
    """The release or the test cannot be asked; the message is one line."""


def server_parser() -> flags.FlagParser:
    """The parser of `sglang.launch_server`. Raises Unreadable where an answer would rest on a stand-in."""
    server_args = importlib.import_module("sglang.srt.server_args")
    parser = flags.FlagParser(prog=SERVER)
    server_args.ServerArgs.add_cli_args(parser)
    for action in parser._actions:
        if any(map(is_stand_in, (action.choices, action.type, action.nargs, action.option_strings))):
            raise Unreadable(f"{action.option_strings[0]}: its values come from a package that is not installed")
    return parser


def router_parser() -> flags.FlagParser | None:
    """The parser of the load balancer, where sglang-router is installed."""
    try:
        from sglang_router.router_args import RouterArgs
    except ImportError:
        return None
    parser = flags.FlagParser(prog=ROUTER)
    RouterArgs.add_cli_args(parser, use_router_prefix=False)
    return parser


def process(
    launch: recording.Launch, request: Mapping[str, Any], parsers: Mapping[str, flags.FlagParser | None]
) -> dict[str, Any]:
    """One launched process as plain data: what it is, what is wrong with it, and what it takes of the machine.

    `checked` is false where no parser for its flags is at hand.
    """
    argv, env = [*launch.argv], dict(launch.env)
    answer: dict[str, Any] = {"module": launch.module, "argv": argv, "env": env, "settings": None, "ports": {}}
    parser = parsers.get(launch.module)
    answer["checked"] = parser is not None
    if launch.module in SERVERS:
        argv += request["extra_argv"]
        env.update(request["extra_env"])
    findings = environment.check(Path(request["root"], "sglang", "srt", "environ.py"), env)
    if parser:
        required = MODEL if launch.module in SERVERS else []
        on_flags, accepted = flags.check(parser, argv, required)
        findings = on_flags + findings
        args = flags.by_name(parser, parser.parse_args([*required, *accepted]))
        if launch.module in SERVERS:
            findings += kv_checksum.check(Path(request["root"]), args)
            answer["settings"] = settings.of_server(args)
            answer["ports"] = settings.ports_of_server(args, sys.modules["sglang.srt.server_args"])
        else:
            answer["ports"] = {"http": args.port}
    return answer | {"findings": [remark_as_data(finding) for finding in findings]}


def fixture_facts(fixture: type) -> dict[str, bool]:
    """What the PD fixture of this release does for a test."""
    plain: Any = type("Plain", (fixture,), {})
    with mock.patch.dict(os.environ):
        plain.setUpClass()
    return {
        "pins NCCL ports": hasattr(plain, "prefill_nccl_port"),
        "NICs by GPU": hasattr(fixture, "rdma_devices_for"),
        "watches processes": hasattr(plain, "_fail_fast_stop"),
    }


def attached(version: str) -> dict[str, list[str]]:
    """Puts our names in the place of SGLang's, as a test is run; which, by module. Raises Unreadable if some lack."""
    from pdkit.deployment import attach, quirks

    try:
        attach.attach(version)
    except NotReady as error:
        raise Unreadable(str(error)) from None
    return {module: sorted(names) for module, names in quirks.substituted(version).items()}


def registrations(path: str) -> list[dict[str, Any]]:
    """The CI registrations of a test file."""
    register = importlib.import_module("sglang.test.ci.ci_register")
    found, _ = register.ut_parse_one_file(path)
    return [{"hw": r.backend.name.lower(), "suite": r.effective_suite, "nightly": r.nightly} for r in found]


Parsers = dict[str, flags.FlagParser | None]


def answer_of_release(request: Mapping[str, Any]) -> tuple[dict[str, Any], Parsers]:
    """What does not depend on a test, and the parsers by module. Raises Unreadable."""
    importer = None
    if request["real_imports"]:
        sys.path.insert(0, request["root"])
    else:
        importer = Importer(Path(request["root"]), request["version"])
        importer.install()
    logging.disable()
    parser = server_parser()
    registry = environment.load(Path(request["root"], "sglang", "srt", "environ.py"))
    result = {
        "version": request["version"],
        "flags": flags.describe(parser),
        "variables": sorted(environment.known(registry)),
        "assumed": importer.assumed if importer else {},
    }
    fixture = importlib.import_module("sglang.test.server_fixtures.disaggregation_fixture").PDDisaggregationServerBase
    result["fixture"] = fixture_facts(fixture)
    recording.start_recording()
    result["substituted"] = attached(request["version"])
    return result, {**dict.fromkeys(SERVERS, parser), ROUTER: router_parser()}


def answer_of_test(path: str, request: Mapping[str, Any], parsers: Parsers) -> dict[str, Any]:
    """What the test file at `path` launches, once the release has answered. Raises Unreadable."""
    baseline = dict(os.environ)
    try:
        module = recording.import_test(Path(path))
    except Exception as error:
        raise Unreadable(f"{path}: cannot be imported: {type(error).__name__}: {error}") from error
    fixture = importlib.import_module("sglang.test.server_fixtures.disaggregation_fixture").PDDisaggregationServerBase
    plans = [recording.record(test, baseline) for test in recording.pd_tests(module, fixture)]
    return {
        "registrations": registrations(path),
        "plans": [
            {
                "test": plan.test,
                "problem": plan.problem,
                "processes": [process(launch, request, parsers) for launch in plan.launches],
            }
            for plan in plans
        ],
    }


def without_answer(error: Unreadable) -> dict[str, Any]:
    """The answer of one line that says why there is none."""
    return {"unreadable": " ".join(str(error).split())}


def end(answer: Callable[[], dict[str, Any]], answer_path: str) -> NoReturn:
    """Ends this process with its answer in the file at `answer_path`."""
    status = 1
    try:
        try:
            found = answer()
        except Unreadable as error:
            found = without_answer(error)
        Path(answer_path).write_text(json.dumps(found))
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # neither waits for threads that wait for ever, nor runs what a test left for its end


def main(request_path: str, *answer_paths: str) -> NoReturn:
    gc.disable()  # a process of half a second keeps what it makes
    request: dict[str, Any] = json.loads(Path(request_path).read_text())
    parsers: Parsers = {}
    try:
        release, parsers = answer_of_release(request)
    except Unreadable as error:
        release = without_answer(error)
    except BaseException:
        traceback.print_exc()
        os._exit(1)

    def answer(test: str | None) -> dict[str, Any]:
        if test is None or "unreadable" in release:
            return release
        return release | answer_of_test(test, request, parsers)

    *others, last = zip(request["tests"], answer_paths, strict=True)
    for test, path in others:
        if not os.fork():
            end(partial(answer, test), path)
        os.wait()
    end(partial(answer, last[0]), last[1])


if __name__ == "__main__":
    main(*sys.argv[1:])
