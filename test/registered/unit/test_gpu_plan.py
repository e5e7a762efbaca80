"""Placement, ports and NICs of the plans that PD tests make."""

import ast
import dataclasses
import io
import json
import unittest
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from cases import FolderCase, pdkit
from pdkit.core import numa
from pdkit.core.ci_register import register_cpu_ci
from pdkit.core.errors import ExitCode
from pdkit.preflight import plan as gpu_plan
from pdkit.preflight.contract import launches
from pdkit.preflight.contract.release import installed
from pdkit.preflight.plan import GpuPlan, Runner, Server, span
from pdkit.preflight.plan_view import draw
from rich.console import Console

register_cpu_ci(est_time=5, suite="stage-a-test-cpu")

REPO = Path(__file__).parents[3]
DSV4 = REPO / "test" / "registered" / "distributed" / "test_disaggregation_dsv4.py"
H200 = Runner.of_suite("stage-c-test-dsv4-8-gpu-h200")

PREFILL = Server("prefill", tp=4, attention_dp=4, mem_fraction=0.7, ports={"http": 21100, "nccl": 21300})
DECODE = dataclasses.replace(PREFILL, name="decode", base_gpu_id=4, ports={"http": 21200, "nccl": 21400})


def plan(prefill=None, decode=None, runner=H200, others=None):
    """Prefill and decode of the main job, with what is different."""
    servers = (dataclasses.replace(PREFILL, **prefill or {}), dataclasses.replace(DECODE, **decode or {}))
    return GpuPlan("TestPD", servers, others or {"load balancer": {"http": 21000}}, runner)


class TestPlacement(unittest.TestCase):
    def test_without_dp_attention_they_need_32(self):
        outside = {"replicas": 4, "attention_dp": 1}
        both = plan(outside, outside | {"base_gpu_id": 16})
        self.assertEqual(both.gpus, tuple(range(32)))
        self.assertEqual(both.servers[0].why, "dp 4 x tp 4 = 16 GPUs from GPU 0: 0-15")

    def test_groups_of_attention(self):
        ranks = Server("x", tp=8, attention_dp=4).ranks
        self.assertEqual([(r.gpu, r.tp, r.attention_dp) for r in ranks], [(i, i, i // 2) for i in range(8)])

    def test_pipeline_stages(self):
        server = Server("x", pp=2, tp=2, base_gpu_id=3)
        self.assertEqual([(r.gpu, r.pp, r.tp) for r in server.ranks], [(3, 0, 0), (4, 0, 1), (5, 1, 0), (6, 1, 1)])
        self.assertEqual(server.why, "pp 2 x tp 2 = 4 GPUs from GPU 3: 3-6")

    def test_steps(self):
        self.assertEqual(Server("x", tp=4, gpu_id_step=2, base_gpu_id=1).gpus, (1, 3, 5, 7))
        self.assertEqual(Server("x", tp=2, replicas=2, gpu_id_step=2).gpus, (0, 2, 4, 6))
        self.assertIn("in steps of 2: 0, 2", Server("x", tp=2, gpu_id_step=2).why)

    def test_placement_is_that_of_sglang(self):
        """The expressions by which the installed release computes `gpu_id`, evaluated for some shapes."""
        source = installed().root / "sglang" / "srt" / "managers" / "data_parallel_controller.py"
        nodes = [*ast.walk(ast.parse(source.read_text()))]
        (gpu_id,) = (n.value for n in nodes if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "gpu_id")
        (step,) = (n.value for n in nodes if isinstance(n, ast.AugAssign) and ast.unparse(n.target) == "base_gpu_id")
        gpu_id, step = (compile(ast.Expression(node), str(source), "eval") for node in (gpu_id, step))
        for tp, pp, dp, gpu_id_step, base in ((4, 1, 1, 1, 4), (2, 2, 1, 1, 1), (2, 1, 3, 2, 0), (2, 2, 2, 3, 5)):
            shape = SimpleNamespace(tp_size=tp, pp_size=pp, gpu_id_step=gpu_id_step, base_gpu_id=base)
            names = {"get_device": mock.Mock(return_value=shape), "get_parallel": mock.Mock(return_value=shape)}
            names |= {"server_args": shape, "tp_size_per_node": tp, "pp_size_per_node": pp}
            expected = [
                eval(gpu_id, names | {"base_gpu_id": replica * eval(step, names), "pp_rank": p, "tp_rank": t})
                for replica in range(dp)
                for p in range(pp)
                for t in range(tp)
            ]
            server = Server("x", tp=tp, pp=pp, replicas=dp, gpu_id_step=gpu_id_step, base_gpu_id=base)
            self.assertEqual([rank.gpu for rank in server.ranks], expected)

    def test_span(self):
        self.assertEqual(span([7, 0, 1, 2, 4, 6]), "0-2, 4, 6-7")


class TestRunner(unittest.TestCase):
    def test_names(self):
        for suite, name, gpus, memory in (
            ("stage-c-test-dsv4-8-gpu-h200", "8-gpu-h200", 8, 141),
            ("stage-b-test-1-gpu-large", "1-gpu-large", 1, 80),
            ("stage-c-test-deepep-4-gpu-h100", "4-gpu-h100", 4, 80),
            ("nightly-2-gpu", "2-gpu", 2, None),
            ("stage-c-test-4-gpu-x9000", "4-gpu-x9000", 4, None),
        ):
            self.assertEqual(Runner.of_suite(suite), Runner(name, gpus, memory))
        self.assertIsNone(Runner.of_suite("stage-a-test-cpu"))


class TestProblems(unittest.TestCase):
    def assert_problem(self, broken, pattern):
        """Exactly one line, which matches."""
        (line,) = broken.problems()
        self.assertRegex(line, f"^TestPD: {pattern}$")

    def test_ten_gpus(self):
        wide = {"tp": 5, "attention_dp": 5}
        says = r"needs 10 GPUs \(0-9\), the runner is 8-gpu-h200 \(8 GPUs of 141 GB\), so there is no GPU 8-9: "
        self.assert_problem(plan(wide, wide | {"base_gpu_id": 5}), f"{says}prefill 0-4, decode 5-9")
        self.assertEqual(plan(wide, wide | {"base_gpu_id": 5}, runner=None).problems(), [])
        self.assert_problem(plan(decode={"base_gpu_id": 6}), "needs 8 GPUs .*there is no GPU 8-9: .*decode 6-9")

    def test_overlap(self):
        self.assert_problem(plan(decode={"base_gpu_id": 2}), "prefill and decode use GPU 2-3 together, 0.7 \\+ 0.7 .*")
        alone = {"tp": 1, "attention_dp": 1, "base_gpu_id": 0}
        one_gpu = Runner.of_suite("stage-b-test-1-gpu-large")
        for fractions, is_fine in (((0.3, 0.3), True), ((0.5, 0.4), True), ((0.5, 0.5), False), ((0.3, None), False)):
            shared = plan(*(alone | {"mem_fraction": f} for f in fractions), runner=one_gpu)
            self.assertEqual(not shared.problems(), is_fine, fractions)
        third = dataclasses.replace(DECODE, name="third", ports={}, **alone | {"mem_fraction": 0.4})
        two = plan(*[alone | {"mem_fraction": 0.4}] * 2, runner=one_gpu)
        self.assertEqual(two.problems(), [])
        three = dataclasses.replace(two, servers=(*two.servers, third))
        self.assert_problem(three, "prefill and decode and third use .*")

    def test_ranks_of_one_server_on_one_gpu(self):
        twice = {"pp": 2, "tp": 2, "attention_dp": 1, "gpu_id_step": 2}  # GPUs 0, 2 and 2, 4
        self.assert_problem(plan(twice, {"tp": 1, "attention_dp": 1, "base_gpu_id": 6}), "prefill puts 2 .* on GPU 2")

    def test_what_one_flag_of_prefill_makes_impossible(self):
        for flag, says in (
            ({"attention_dp": 3}, "prefill: DP attention cannot split tp 4 into dp 3 equal groups"),
            ({"nnodes": 2}, "prefill spans 2 nodes; a suite has one"),
            *(
                ({"mem_fraction": share}, f"prefill: --mem-fraction-static {share} is no share .*")
                for share in (0, 1, 1.5)
            ),
            *(({"ports": {"http": port, "nccl": 1}}, f"prefill http: there is no port {port}") for port in (0, 65536)),
        ):
            self.assert_problem(plan(flag), says)

    def test_nccl_port_of_replicas(self):
        replicas = {"tp": 2, "replicas": 2, "attention_dp": 1}
        self.assertEqual(plan(replicas).problems(), [])
        self.assert_problem(plan(replicas | {"pins_nccl": True}), "prefill: its 2 replicas .* NCCL port 21300; .*")

    def test_port_clash(self):
        decode = {"ports": {"http": 21200, "nccl": 21300}}
        self.assert_problem(plan(decode=decode), "port 21300 is wanted by prefill nccl and decode nccl")
        others = {"load balancer": {"http": 21100}}
        self.assert_problem(plan(others=others), "port 21100 is wanted by prefill http and load balancer http")
        derived = {"ports": {"http": 21100, "nccl": 21334, "port_base": 21334}}
        self.assert_problem(plan(derived), "port 21334 is wanted by prefill nccl and prefill port_base")


class TestWarnings(unittest.TestCase):
    def test_none(self):
        self.assertEqual(plan().warnings(), [])

    def assert_warning(self, risky, pattern, *sockets):
        (line,) = risky.warnings(*sockets)
        self.assertRegex(line, f"^TestPD: {pattern}; (pin|choose|pass) .+$")  # with what to do

    def test_nccl_ports_drawn_by_both(self):
        drawn = ({"ports": {"http": 21100}}, {"ports": {"http": 21200}})
        self.assert_warning(plan(*drawn), "prefill and decode draw their NCCL port .* may draw the same")
        self.assertEqual(plan(drawn[0]).warnings(), [])

    def test_ports_that_others_draw(self):
        ports = {"ports": {"http": 33000, "nccl": 21300}}
        self.assert_warning(plan(ports), "prefill http: port 33000 may be taken by an outgoing connection")
        ports = {"ports": {"http": 15000, "nccl": 21300}}
        self.assertEqual(plan(ports).warnings(), [])
        mooncake = plan(ports | {"transfer_backend": "mooncake_tcp"})
        self.assert_warning(mooncake, "prefill http: port 15000 may be drawn by Mooncake")

    def test_nics_of_both_sides(self):
        nics = {"nics": ("mlx5_0", "mlx5_4")}
        self.assert_warning(plan(nics, nics), "prefill and decode share NIC mlx5_0, mlx5_4")
        alone = {"tp": 1, "attention_dp": 1, "base_gpu_id": 0, "mem_fraction": 0.3}
        self.assertEqual(plan(nics | alone, nics | alone).warnings(), [])

    def test_nic_of_the_other_socket(self):
        nics = {f"mlx5_{i}": i // 4 for i in range(8)}
        gpus = {i: i // 4 for i in range(8)}
        near = plan({"nics": ("mlx5_0",)}, {"nics": ("mlx5_4", "mlx5_5")})
        self.assertEqual(near.warnings(nics, gpus), [])
        far = plan({"nics": ("mlx5_0",)}, {"nics": ("mlx5_4", "mlx5_1")})
        pattern = r"decode: NIC mlx5_1 sits on another socket than its GPUs 4-7 \(socket 1\)"
        self.assert_warning(far, pattern, nics, gpus)
        self.assertEqual(far.warnings(nics), [])
        self.assertEqual(far.warnings({"mlx5_4": 1}, gpus), [])


class TestSockets(FolderCase):
    def test_sysfs(self):
        for name, node in (("mlx5_0", "0"), ("mlx5_1", "1"), ("mlx5_2", "-1")):
            self.write(f"class/infiniband/{name}/device/numa_node", f"{node}\n")
        (self.root / "class/infiniband/mlx5_3").mkdir()
        self.assertEqual(numa.nic_sockets(self.root), {"mlx5_0": 0, "mlx5_1": 1})
        self.assertEqual(numa.nic_sockets(self.root / "nothing"), {})

    def test_pci_address(self):
        for address in ("00000000:1B:00.0", b"00000000:1B:00.0"):
            self.assertEqual(numa.pci_device(Path("/sys"), address), Path("/sys/bus/pci/devices/0000:1b:00.0"))


class TestNics(FolderCase):
    def test_spellings(self):
        by_gpu = '{"0": "mlx5_0,mlx5_1", "1": "mlx5_1, mlx5_2"}'
        file = self.write("nics.json", by_gpu)
        for value, nics in (
            (None, ()),
            ("mlx5_0, mlx5_4,mlx5_0", ("mlx5_0", "mlx5_4")),
            (by_gpu, ("mlx5_0", "mlx5_1", "mlx5_2")),
            (str(file), ("mlx5_0", "mlx5_1", "mlx5_2")),
        ):
            self.assertEqual(gpu_plan._nics_of(value), nics)


def as_text(*args, **kwargs):
    console = Console(file=io.StringIO(), width=100, color_system=None, highlight=False, soft_wrap=True)
    console.print(draw(*args, **kwargs))
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


class TestDrawing(unittest.TestCase):
    def test_main_job(self):
        text = as_text(plan({"nics": ("mlx5_0",)}))
        self.assertIn("TestPD on 8-gpu-h200 (8 GPUs of 141 GB): 8 GPUs used", text)
        rows = [line.split() for line in text.splitlines()]
        self.assertIn(["prefill", "tp0", "tp1", "tp2", "tp3", *"····"], rows)
        self.assertIn(["decode", *"····", "tp0", "tp1", "tp2", "tp3"], rows)
        self.assertIn(["dp0", "dp1", "dp2", "dp3"], rows)
        self.assertIn("prefill: ports 21100 http, 21300 nccl", text)
        self.assertIn("load balancer: ports 21000 http", text)
        self.assertIn("\nprefill: NICs mlx5_0\n", text)
        self.assertIn("decode: NICs left to the transfer backend", text)
        text = as_text(plan({"nics": ("mlx5_0", "mlx5_1")}), nic_sockets={"mlx5_1": 1})
        self.assertIn("prefill: NICs mlx5_0, mlx5_1 (socket 1)\n", text)

    def test_gpus_that_the_runner_lacks(self):
        self.assertRegex(as_text(plan(decode={"base_gpu_id": 6})), r"GPU .* 7 +8\? +9\?")

    def test_no_gpu(self):
        self.assertIn("TestPD uses no GPU", as_text(GpuPlan("TestPD", ())))


TEN = """
import unittest
from sglang.test.ci.ci_register import register_cuda_ci
from pdkit.checks.accuracy.checks import GSM8KChecks
from pdkit.deployment.multi_gpu import EightGpuServers

register_cuda_ci(est_time=1, suite="stage-c-test-8-gpu-h200")


class TestTen(GSM8KChecks, EightGpuServers):
    server_args = [*EightGpuServers.server_args, "--tp-size", "5", "--dp-size", "5"]
    prefill_gpus, decode_gpus = range(5), range(5, 10)


if __name__ == "__main__":
    unittest.main()
"""


class TestFromContract(FolderCase):
    """The whole way: the test is asked what it launches, the installed release what its flags mean."""

    @classmethod
    def setUpClass(cls):
        cls.contract = launches.ask(installed(), DSV4)

    def plan(self, suite=None, **changes):
        """The plan of the main job, its contract changed like that."""
        (found,) = gpu_plan.of_contract(dataclasses.replace(self.contract, **changes), suite)
        return found

    def test_main_job(self):
        """The dispute: "tp 4 and dp 4 on each side need 16 GPUs". With DP attention dp is carved out of tp."""
        found = self.plan()
        self.assertEqual([s.name for s in found.servers], ["prefill", "decode"])
        self.assertEqual(found.gpus, tuple(range(8)))
        self.assertEqual([s.gpus for s in found.servers], [(0, 1, 2, 3), (4, 5, 6, 7)])
        self.assertEqual([(s.tp, s.attention_dp, s.replicas) for s in found.servers], [(4, 4, 1)] * 2)
        self.assertEqual(found.runner, H200)
        self.assertEqual(found.problems(), [])
        prefill, decode = found.servers
        self.assertEqual([rank.attention_dp for rank in prefill.ranks], [0, 1, 2, 3])
        self.assertIn("tp 4 = 4 GPUs from GPU 0: 0-3; dp 4 is carved out of tp 4 by DP attention", prefill.why)
        self.assertEqual(prefill.mem_fraction, 0.7)
        self.assertIn("bootstrap", prefill.ports)
        self.assertNotIn("bootstrap", decode.ports)
        self.assertEqual(gpu_plan.as_data(found)["servers"][1]["gpus"], [4, 5, 6, 7])
        self.assertEqual(gpu_plan.as_data(found)["runner"], {"name": "8-gpu-h200", "gpus": 8, "memory_gb": 141})
        json.dumps(gpu_plan.as_data(found))

    def test_ports_that_sglang_derives(self):
        prefill, _ = self.plan().servers
        http = prefill.ports["http"]
        # DP attention over TCP: rendezvous at 233 above, and the sockets of tokenizer, detokenizer, ... after it
        derived = ("dist_init", "port_base", "detokenizer", "rpc", "metrics", "scheduler_input")
        self.assertEqual([prefill.ports[use] - http for use in derived], [233, 234, 235, 236, 237, 238])
        port = http + 234
        contract = launches.ask(installed(), DSV4, ["--nccl-port", str(port)])
        (clash,) = gpu_plan.of_contract(contract)[0].problems()
        self.assertRegex(clash, f": port {port} is wanted by .*prefill port_base.* and decode nccl$")

    def test_runner(self):
        self.assertEqual(self.plan(suite="stage-b-test-1-gpu-large").runner, Runner("1-gpu-large", 1, 80))
        self.assertEqual(self.plan(suites=("stage-a-test-cpu", "x-4-gpu-h100")).runner, Runner("4-gpu-h100", 4, 80))
        self.assertIsNone(self.plan(suites=("stage-a-test-cpu",)).runner)

    def test_several_of_a_name(self):
        (test,) = self.contract.tests
        doubled = dataclasses.replace(test, processes=test.processes * 2)
        names = ["prefill", "decode", "prefill 2", "decode 2"]
        found = gpu_plan.of_test(doubled, H200)
        self.assertEqual([server.name for server in found.servers], names)
        self.assertEqual([*found.others], ["load balancer", "load balancer 2"])
        self.assertEqual(len(found.ports), 2 * len(gpu_plan.of_test(test, H200).ports))

    def test_command(self):
        code, out, err = pdkit("plan")
        self.assertEqual((code, err), (ExitCode.PASSED, ""))
        self.assertIn("8 GPUs used", out)

        code, _, err = pdkit("plan", self.write("test_ten.py", TEN))
        self.assertEqual(code, ExitCode.NOT_READY)
        self.assertRegex(err, r"\Apdkit plan: error: TestTen: needs 10 GPUs \(0-9\), the runner is 8-gpu-h200 .*\n\Z")

        code, out, err = pdkit("plan", "--flags", "--tp-size four", "--json")
        self.assertEqual(code, ExitCode.BAD_USAGE)
        self.assertEqual(json.loads(out)[0]["gpus"], [*range(8)])
        self.assertRegex(err, r"\A.*--tp-size: invalid int value: 'four'.*\n\Z")


if __name__ == "__main__":
    unittest.main()
