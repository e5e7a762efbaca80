"""Processes that a test starts: which calls start one, and how it is made sure that none is left."""

import ast
import re
from collections.abc import Iterator
from functools import lru_cache

from pdkit.core.source import Source, TestClass
from pdkit.preflight.lint.findings import Finding

_LOOP = (ast.While, ast.For, ast.AsyncFor)
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
STARTERS = re.compile(
    r"subprocess\.Popen|(multiprocessing|torch\.multiprocessing)(\.\w+)*\.Process|os\.(fork|posix_spawnp?|spawn\w+)"
    r"|asyncio(\.subprocess)?\.create_subprocess_(exec|shell)|psutil\.Popen"
    r"|sglang\.test\.test_utils\.popen_\w+|sglang\.utils\.(launch_server_cmd|execute_shell_command)"
)
LISTENERS = re.compile(r"(.*\.)?(HTTPServer|ThreadingHTTPServer|TCPServer|create_server)|uvicorn\.(run|Config)")
_ENDS = {"kill", "terminate", "stop", "close", "shutdown", "send_signal", "kill_process_tree", "killpg", "release"}
_ENDS |= {"terminate_and_kill_process_tree", "terminate_process", "tearDown", "tearDownClass"}
_REGISTERS_CLEANUP = {"addCleanup", "addClassCleanup", "addModuleCleanup", "enterContext", "enterClassContext"}
_REGISTERS_CLEANUP |= {"enterModuleContext", "enter_context", "register", "callback", "push"}
_ENTERS = {"enterContext", "enterClassContext", "enterModuleContext", "enter_context"}
_FIXTURE_ENDS = {"process_prefill", "process_decode", "process_lb"}
_CLEANS_FAILED_SETUP = {"CustomTestCase", "PDDisaggregationServerBase"}


def _name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _calls(node: ast.AST) -> list[ast.Call]:
    return [child for child in ast.walk(node) if isinstance(child, ast.Call)]


class Starters:
    """The calls in a file that start a process, functions of the file that return one included."""

    def __init__(self, source: Source):
        self.source = source
        self.popen_classes = {
            name for name, cls in source.classes.items() if any(STARTERS.fullmatch(n) for n in cls.ancestry[1])
        }
        self.factories: set[str] = set()
        functions = [node for node in source.nodes if isinstance(node, FUNCTION)]
        while added := {f.name for f in functions if self._returns_process(f)} - self.factories:
            self.factories |= added
        self.calls = [call for call in source.calls if self.starts(call) and not self._is_returned(call)]

    def starts(self, call: ast.Call) -> bool:
        name = self.source.dotted(call.func)
        if STARTERS.fullmatch(name) or name in self.popen_classes:
            return True
        owner, _, method = name.rpartition(".")
        return method in self.factories and owner in ("", "self", "cls")

    def _is_returned(self, call: ast.Call) -> bool:
        parent = self.source.parents[call]
        if isinstance(parent, ast.Return):
            return True
        function = next(self.source.enclosing(call, FUNCTION), None)
        if function is None or not isinstance(parent, ast.Assign):
            return False
        names = {target.id for target in parent.targets if isinstance(target, ast.Name)}
        returned = [node.value for node in ast.walk(function) if isinstance(node, ast.Return)]
        return any(isinstance(value, ast.Name) and value.id in names for value in returned)

    def _returns_process(self, function: ast.FunctionDef) -> bool:
        return any(self.starts(call) and self._is_returned(call) for call in _calls(function))


@lru_cache(maxsize=256)
def starters(source: Source) -> Starters:
    return Starters(source)


def unended_process(source: Source, _) -> Iterator[Finding]:
    """Every process that is started is ended, also when what follows fails."""
    for call in starters(source).calls:
        problem = _unended(source, call)
        if problem:
            yield Finding(source.path, call.lineno, "unended-process", f"{_name(call)}(...) {problem}")


def _unended(source: Source, call: ast.Call) -> str | None:
    if any(isinstance(node, ast.withitem) for node in _ancestors_in_statement(source, call)):
        return None
    if any(_name(node) in _ENTERS for node in _ancestors_in_statement(source, call) if isinstance(node, ast.Call)):
        return None
    function = next(source.enclosing(call, FUNCTION), None)
    scope = function or source.tree
    if any(_name(c) in _REGISTERS_CLEANUP for c in _calls(scope)) or any(_is_ended(t) for t in _tries(scope)):
        return None
    definition = next(source.enclosing(call, ast.ClassDef), None)
    if definition is None or function is None:
        return "is never ended where the code after it fails; use `with`, try/finally or addCleanup()"
    return _unended_of_class(TestClass(source, definition), function, _assigned_attribute(source, call))


def _unended_of_class(cls: TestClass, function: ast.FunctionDef, attribute: str | None) -> str | None:
    external = {name.rpartition(".")[2] for name in cls.ancestry[1]}
    if cls.is_pd and attribute in _FIXTURE_ENDS:
        return None
    tear_downs = [found[1] for name in ("tearDown", "tearDownClass") if (found := cls.method(name))]
    if attribute:
        tear_downs = [function for function in tear_downs if _mentions(function, attribute)]
    if not any(_name(call) in _ENDS for function in tear_downs for call in _calls(function)):
        return "is never ended; call addCleanup() or addClassCleanup() right after it"
    if function.name in ("setUp", "setUpClass") and not external & _CLEANS_FAILED_SETUP:
        skipped = "tearDown" if function.name == "setUp" else "tearDownClass"
        register = "addCleanup" if function.name == "setUp" else "addClassCleanup"
        return f"is left over where {function.name} fails, since unittest skips {skipped} then; use {register}()"
    return None


def _ancestors_in_statement(source: Source, node: ast.AST) -> Iterator[ast.AST]:
    while (node := source.parents.get(node)) and not isinstance(node, ast.stmt):
        yield node


def _tries(scope: ast.AST) -> list[ast.Try]:
    return [node for node in ast.walk(scope) if isinstance(node, ast.Try) and node.finalbody]


def _is_ended(block: ast.Try) -> bool:
    return any(_name(call) in _ENDS for statement in block.finalbody for call in _calls(statement))


def _assigned_attribute(source: Source, call: ast.Call) -> str | None:
    statement = next(source.enclosing(call, ast.stmt))
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    return next((target.attr for target in targets if isinstance(target, ast.Attribute)), None)


def _mentions(function: ast.FunctionDef, attribute: str) -> bool:
    return any(attribute in (getattr(n, "attr", None), getattr(n, "value", None)) for n in ast.walk(function))


_KILLS_BY_NAME = re.compile(r"\b(pkill|killall|killall_sglang|pgrep|pidof)\b|\bfuser\s+(-\w+\s+)*-k")
_SHELL = re.compile(r"(subprocess|os|asyncio)\.\w+|psutil\.Popen|(sglang\..*\.)?(run_command|execute_shell_command)")


def kill_by_name(source: Source, _) -> Iterator[Finding]:
    """A name also fits processes that this test did not start."""
    advice = "end the process that was started, by its handle: process.terminate(), kill_process_tree(process.pid)"
    for call in source.calls:
        if _SHELL.fullmatch(source.dotted(call.func)):
            words = [n.value for n in ast.walk(call) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            if match := next(filter(None, map(_KILLS_BY_NAME.search, words)), None):
                message = f"{match.group()} finds processes by name or port, strangers' too; {advice}"
                yield Finding(source.path, call.lineno, "kill-by-name", message)
        elif source.dotted(call.func) == "psutil.process_iter":
            scope = next(source.enclosing(call, FUNCTION), source.tree)
            if any(_name(c) in _ENDS - {"close", "release"} for c in _calls(scope)):
                message = f"psutil.process_iter() finds strangers' processes too; {advice}"
                yield Finding(source.path, call.lineno, "kill-by-name", message)


def sleep_as_readiness(source: Source, _) -> Iterator[Finding]:
    """In a file that starts processes: passing time says nothing about whether they are ready."""
    if not starts_processes(source):
        return
    for call in source.calls:
        if source.dotted(call.func) not in ("time.sleep", "asyncio.sleep"):
            continue
        scope = next(source.enclosing(call, (*_LOOP, *FUNCTION)), source.tree)
        if not (_looks(scope) if isinstance(scope, _LOOP) else _hangs(scope, call, starters(source))):
            message = (
                "time passes, whether it is ready or not; wait for it: wait_server_ready(url), process.wait(), ..."
            )
            yield Finding(source.path, call.lineno, "sleep-as-readiness", message)


def _hangs(scope: ast.AST, sleep: ast.Call, known: Starters) -> bool:
    """Nothing in the function comes after the sleep, and nothing was started before it."""
    last = any(sleep is node for node in ast.walk(scope.body[-1]))
    return last and not any(map(known.starts, _calls(scope)))


def _looks(loop: ast.While | ast.For) -> bool:
    if isinstance(loop, ast.While) and not isinstance(loop.test, ast.Constant):
        return True
    decides = (ast.Break, ast.Return, ast.Raise)
    return any(isinstance(node, decides) for statement in loop.body for node in ast.walk(statement))


def starts_processes(source: Source) -> bool:
    """Whether anything in the file starts a process, the classes on SGLang's PD fixture included."""
    return any(cls.is_pd for cls in source.classes.values()) or bool(starters(source).calls)


def launches(source: Source) -> bool:
    """Whether anything in the file starts a process or listens."""
    return starts_processes(source) or any(LISTENERS.fullmatch(source.dotted(c.func)) for c in source.calls)
