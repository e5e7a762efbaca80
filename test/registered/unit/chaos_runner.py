"""Kills the suite runner at random moments and counts what it leaves: processes, and TCP ports with a listener.

    python3 test/registered/unit/chaos_runner.py                # 20 rounds of each, on a suite of fake servers
    python3 test/registered/unit/chaos_runner.py --on embedded  # on the main job with the embedded engine

Each night `test_chaos_nightly.py` runs some rounds.

The fake servers listen, fork, take a session of their own, orphan themselves and drop their environment. After SIGINT
and SIGTERM it is counted at the runner's exit; after SIGKILL, of the runner or of its guardian too, after the next
start of a runner. This process is a child subreaper, so that nothing that was started can get out of its sight; what is
left in a round is ended before the next. Exit code 1 if anything was left.
"""

import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import psutil
from pdkit.core import ports, processes
from pdkit.core.command import Parser, count, run_command
from pdkit.core.console import columns
from pdkit.core.errors import ExitCode
from pdkit.core.processes import become_subreaper
from pdkit.runner.guardian import Children
from pdkit.runner.owner import GUARDIAN_VARIABLE, TOKEN_VARIABLE, new_token
from pdkit.runner.targets import TARGETS
from suite_trees import RUN_SUITE, source_of, write_tree

PATIENCE_S = 120.0

SERVER = """
import os, socket, sys, time
kind, ready = sys.argv[1:3]
if kind in ("orphan", "bare orphan"):
    if os.fork():
        os._exit(0)
    os.setsid()
    if kind == "bare orphan":
        os.execve(sys.executable, [sys.executable, "-IS", __file__, "session", ready], {})
listener = socket.create_server(("127.0.0.1", 0))
if os.fork():
    os.close(os.open(ready, os.O_CREAT))
    time.sleep(600)
worker = socket.create_server(("127.0.0.1", 0))
time.sleep(600)
"""
KINDS = ("child", "session", "orphan", "bare orphan")

TEST = """
def test_it(self):
    import os, subprocess, sys, tempfile, time
    with tempfile.TemporaryDirectory() as directory:
        servers = []
        for number, kind in enumerate({kinds!r}):
            command = [sys.executable, "-IS", {server!r}, kind, os.path.join(directory, str(number))]
            servers.append(subprocess.Popen(command, start_new_session=kind != "child"))
        while len(os.listdir(directory)) < len(servers):
            time.sleep(0.05)
        time.sleep(0.3)
        servers[0].kill()
        servers[0].wait()
"""


@dataclass(frozen=True)
class Attack:
    """What is done to the runner; `kinds` of fake servers run meanwhile."""

    name: str
    signal: signal.Signals
    on_guardian: bool = False
    kinds: tuple[str, ...] = KINDS


ATTACKS = {
    "int": Attack("SIGINT", signal.SIGINT),
    "term": Attack("SIGTERM", signal.SIGTERM),
    "kill": Attack("SIGKILL", signal.SIGKILL),
    # Without its guardian and its environment, nothing tells an orphan from anybody else's process.
    "kill-both": Attack("SIGKILL, guardian too", signal.SIGKILL, on_guardian=True, kinds=KINDS[:-1]),
}


@dataclass(frozen=True)
class Round:
    """Seconds until the signal; processes and listening ports when it came, and those that were left in the end.

    `in_time` is False where the runner had ended before.
    """

    delay: float
    met: tuple[int, int]
    left: tuple[str, ...]
    left_ports: tuple[int, ...]
    in_time: bool = True


class Chaos:
    def __init__(self, directory: Path, target: str | None, environment: dict[str, str]):
        self.directory, self.target, self.environment = directory, target, environment
        self.me, self.children = psutil.Process(), Children()
        self.ours = set(processes.descendants(self.me))  # a forked test file has a fork server beside it
        server = directory / "server.py"
        server.write_text(SERVER)
        for attack in ATTACKS.values():
            self.tree(attack.kinds, *[source_of(TEST.format(kinds=attack.kinds, server=str(server)))] * 2)
        self.tree((), source_of())

    def tree(self, kinds: Sequence[str], *sources: str) -> Path:
        """A tree of test files, named by the kinds of servers that they start."""
        root = self.directory / ("-".join(kinds).replace(" ", "_") or "next")
        root.mkdir(exist_ok=True)
        return write_tree(root, {f"test_{number}.py": source for number, source in enumerate(sources)})

    def command(self, kinds: Sequence[str]) -> list[str]:
        if kinds and self.target:
            report = tempfile.mkdtemp(dir=self.directory)
            words = ["--on", self.target, "--report-dir", report, "--no-history"]
            return [sys.executable, "-m", "pdkit", "run", *words]
        root = self.tree(kinds)
        return [sys.executable, str(RUN_SUITE), "--hw", "cpu", "--suite", "stage-a-test-cpu", "--test-root", str(root)]

    def start(self, kinds: Sequence[str]) -> subprocess.Popen:
        with open(self.directory / "log", "ab") as log:
            return subprocess.Popen(self.command(kinds), env=self.environment, stdout=log, stderr=log)

    def undisturbed(self, kinds: Sequence[str]) -> float:
        """Seconds that a run takes. Raises SystemExit where it does not pass."""
        tic = time.monotonic()
        if code := self.start(kinds).wait():
            sys.exit(f"an undisturbed run ended with {code}; its output: {self.directory / 'log'}")
        return time.monotonic() - tic

    def alive(self) -> list[psutil.Process]:
        self.children.are_gone()
        return [process for process in processes.descendants(self.me) if process not in self.ours]

    def round(self, attack: Attack, delay: float) -> Round:
        tic, runner = time.monotonic(), self.start(attack.kinds)
        try:
            runner.wait(delay)
        except subprocess.TimeoutExpired:
            pass
        delay = time.monotonic() - tic
        there = processes.descendants(self.me)
        listened = processes.listening_ports(there)
        in_time = runner.poll() is None
        if in_time and attack.on_guardian:
            self.kill_with_guardian(runner)
        else:
            runner.send_signal(attack.signal)
        runner.wait(PATIENCE_S)
        if attack.signal is signal.SIGKILL:  # nobody is left to end the rest but the next runner
            self.undisturbed(())
        left = self.alive()
        taken = listened | processes.listening_ports(left)
        left_ports = sorted({port for port, _ in ports.listeners()} & taken)
        described = tuple(map(processes.describe, left))
        processes.end(self.alive, self.children.are_gone, grace_s=1.0)
        return Round(delay, (len(there), len(listened)), described, tuple(left_ports), in_time)

    def kill_with_guardian(self, runner: subprocess.Popen):
        """Stops the runner first: it would otherwise see that its guardian died, and end the rest."""
        runner.send_signal(signal.SIGSTOP)
        for child in processes.descendants(psutil.Process(runner.pid)):
            try:
                if GUARDIAN_VARIABLE in child.environ():
                    child.kill()
            except psutil.Error:
                pass
        runner.kill()


def table(rounds: dict[Attack, list[Round]]) -> str:
    rows = [("signal", "rounds", "at (s)", "processes met", "ports met", "left", "ports left")]
    for attack, found in rounds.items():
        if not found:
            continue
        delays = [each.delay for each in found]
        rows.append((
            attack.name,
            str(len(found)),
            f"{min(delays):.1f}-{max(delays):.1f}",
            f"{statistics.mean(each.met[0] for each in found):.1f}",
            f"{statistics.mean(each.met[1] for each in found):.1f}",
            str(sum(len(each.left) for each in found)),
            str(sum(len(each.left_ports) for each in found)),
        ))  # fmt: skip
    return columns(rows)


def main(argv: Sequence[str]) -> ExitCode:
    parser = Parser(prog="chaos_runner.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=count, default=20, help="of each attack (default: %(default)s)")
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS), metavar="NAME",
                        help=f"default: {' '.join(ATTACKS)}")  # fmt: skip
    parser.add_argument(
        "--on", dest="target", choices=[target.name for target in TARGETS], help="the main job instead of fake servers"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    args = parser.parse_args(argv)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(ExitCode.INTERRUPTED))
    become_subreaper()
    # Below a token of this process: a run beside it leaves alone what this one leaves behind.
    environment = os.environ | {TOKEN_VARIABLE: new_token(os.environ)}
    rng, usual = random.Random(args.seed), {}
    rounds: dict[Attack, list[Round]] = {ATTACKS[name]: [] for name in args.attacks}
    directory = Path(tempfile.mkdtemp(prefix="chaos_runner_"))
    chaos = Chaos(directory, args.target, environment)
    try:
        for number, attack in product(range(1, args.rounds + 1), rounds):
            kinds = KINDS if args.target else attack.kinds
            if kinds not in usual:
                usual[kinds] = chaos.undisturbed(kinds)
                print(f"an undisturbed run takes {usual[kinds]:.1f} s", flush=True)
            while not (found := chaos.round(attack, rng.uniform(0, usual[kinds]))).in_time:
                usual[kinds] = min(usual[kinds], found.delay)
            rounds[attack].append(found)
            left = "; ".join([*found.left, *(f"port {port}" for port in found.left_ports)]) or "nothing"
            met = f"{found.met[0]} processes, {found.met[1]} ports"
            print(f"{number}/{args.rounds} {attack.name} after {found.delay:.1f} s, {met}: left {left}", flush=True)
    finally:
        processes.end(chaos.alive, chaos.children.are_gone, grace_s=1.0)
        print(table(rounds), f"output of the runners: {directory / 'log'}", sep="\n", flush=True)
    was_clean = not any(each.left or each.left_ports for found in rounds.values() for each in found)
    return ExitCode.PASSED if was_clean else ExitCode.FAILED


if __name__ == "__main__":
    sys.exit(run_command("chaos_runner.py", main, sys.argv[1:]))
