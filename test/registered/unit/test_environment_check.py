"""The environment check: real files in temporary trees, real ports, real SGLang sources; NVML's facts as data."""

import json
import os
import re
import shutil
import socket
import sys
import unittest
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy
from cases import FolderCase, without
from pdkit.core import forked
from pdkit.core.ci_register import register_cpu_ci
from pdkit.core.gpus import Gpu, GpuProcess
from pdkit.core.registry import Registration
from pdkit.core.source import UNKNOWN, read
from pdkit.deployment import quirks
from pdkit.models.cuda import store
from pdkit.preflight import dsv4
from pdkit.preflight.environment import check as checks
from pdkit.preflight.environment import dataset, gpus, machine, model, needs, packages, rdma
from pdkit.preflight.environment.machine import Machine
from pdkit.preflight.environment.needs import Needs
from pdkit.preflight.finding import Level
from pdkit.preflight.plan import Server
from safetensors.numpy import save
from suite_trees import RUN_SUITE, source_of, write_tree

register_cpu_ci(est_time=14, suite="stage-a-test-cpu")

REPO = Path(__file__).resolve().parents[3]
COMMAND = ("-m", "pdkit", "preflight")
DSV4 = REPO / "test" / "registered" / "distributed" / "test_disaggregation_dsv4.py"
GPU_SUITE = "stage-c-test-dsv4-8-gpu-h200"
GIB = 2**30

H200 = Gpu("NVIDIA H200", 143771, (9, 0), 143000)
PAIR = (
    Server("prefill", tp=4, mem_fraction=0.7, transfer_backend="mooncake", models=("repo/model",), test="TestPair"),
    Server(
        "decode",
        tp=4,
        base_gpu_id=4,
        mem_fraction=0.7,
        transfer_backend="mooncake",
        models=("repo/model",),
        test="TestPair",
    ),
)
NEEDS = Needs("cuda", 8, 141, (9, 0), servers=PAIR)
NODE = Machine(
    gpus=(H200,) * 8,
    driver="580.159.04",
    driver_cuda=(13, 0),
    torch_cuda=(13, 0),
    memory_bytes=500 * GIB,
    shm_bytes=64 * GIB,
    tmp_bytes=100 * GIB,
    home_bytes=100 * GIB,
    open_files=1048576,
    locked_bytes=machine.UNLIMITED,
    rdma_openable=True,
)
NICS = [f"mlx5_{number}" for number in range(8)]
PORT = {"state": "4: ACTIVE", "rate": "400 Gb/sec (4X NDR)", "link_layer": "InfiniBand"}
FILES = {f"{nic}/ports/1/{file}": f"{text}\n" for nic in NICS for file, text in PORT.items()}
WITH_NICS = replace(NODE, rdma=FILES)


class CheckCase(FolderCase):
    maxDiff = None

    def assert_fine(self, findings):
        self.assertEqual([str(finding) for finding in findings if finding.level is not Level.OK], [])

    def assert_one(self, findings, level, *says):
        """Exactly one finding is not OK; it has that level and says all of that, in one line."""
        open_findings = [finding for finding in findings if finding.level is not Level.OK]
        self.assertEqual([finding.level for finding in open_findings], [level], open_findings)
        line = str(open_findings[0])
        self.assertNotIn("\n", line)
        for text in says:
            self.assertIn(text, line)
        return line


class TestGpus(CheckCase):
    def check(self, needed=NEEDS, **facts):
        return list(gpus.check(needed, replace(NODE, **facts)))

    def test_enough(self):
        self.assert_fine(self.check())

    def test_too_few(self):
        line = self.assert_one(self.check(gpus=(H200,) * 7), Level.ERROR, "7 found", "needs 8 GPUs of 141 GB")
        self.assertIn("prefill 0-3, decode 4-7", line)
        found = self.check(gpus=(), gpu_problem="no NVIDIA driver")
        self.assert_one(found, Level.ERROR, "0 found, no NVIDIA driver", "run")

    def test_the_suite_says_how_many_where_no_pair_is_launched(self):
        unit = Needs("cuda", 2)
        self.assert_fine(self.check(unit, gpus=(H200,) * 2))
        self.assert_one(self.check(unit, gpus=(H200,)), Level.ERROR, "1 found", "2 GPUs")

    def test_one_that_does_not_do(self):
        h100 = Gpu("NVIDIA H100 80GB HBM3", 81559, (9, 0), 81000)
        b200 = replace(H200, name="NVIDIA B200", capability=(10, 0))
        busy = replace(H200, free_mib=83000, processes=(GpuProcess(4711, "python3", 60000),))
        shared = replace(H200, free_mib=142000, processes=(GpuProcess(4711, "python3", 500),))
        in_use = "decode needs 100640 MiB, found 83000 of 143771 MiB free", "python3 (pid 4711, 60000 MiB)"
        for at, gpu, level, *says in (
            (5, h100, Level.ERROR, "GPU 5: NVIDIA H100", "81559 MiB", "asks for 141 GB (decode)"),
            (0, b200, Level.ERROR, "GPU 0: NVIDIA B200, compute capability 10.0", "for 9.0"),
            (6, busy, Level.ERROR, "GPU 6", *in_use, "nothing here ends them"),
            (0, shared, Level.WARNING, "GPU 0", "in use by python3 (pid 4711"),
        ):
            with self.subTest(says):
                gpus = [H200] * 8
                gpus[at] = gpu
                self.assert_one(self.check(gpus=tuple(gpus)), level, *says)

    def test_two_servers_on_one_gpu(self):
        both = [replace(server, tp=1, base_gpu_id=0, mem_fraction=0.5) for server in PAIR]
        self.assert_one(self.check(replace(NEEDS, servers=both)), Level.ERROR, "prefill and decode need 143771 MiB")
        third = [replace(server, mem_fraction=0.3) for server in both]
        self.assert_fine(self.check(replace(NEEDS, servers=third)))
        one_after_the_other = [replace(server, test=server.name) for server in both]
        self.assert_fine(self.check(replace(NEEDS, servers=one_after_the_other)))

    def test_driver(self):
        self.assert_one(self.check(driver_cuda=(12, 8)), Level.ERROR, "runs CUDA 12.8, torch was built for 13.0")
        self.assert_one(self.check(torch_cuda=(13, 1)), Level.WARNING, "runs CUDA 13.0, torch was built for 13.1")
        self.assert_fine(self.check(driver_cuda=(13, 2)))

    @unittest.skipIf(os.path.exists("/dev/nvidiactl"), "this machine has a driver")
    def test_a_machine_without_driver(self):
        seen = machine.observe(gpus=True)
        self.assertEqual((seen.gpus, seen.driver), ((), None))
        self.assertIn("no NVIDIA driver", seen.gpu_problem)
        self.assertEqual(seen.torch_cuda, (13, 0))


class TestMachine(CheckCase):
    def test_round_trip(self):
        busy = replace(H200, processes=(GpuProcess(1, "x", 5),))
        described = replace(NODE, gpus=(busy,), rdma={"mlx5_0/ports/1/state": "4: ACTIVE\n"})
        self.assertEqual(Machine.from_json(described.to_json()), described)

    def test_bad_descriptions(self):
        for text in ("", "[]", '{"gpus": 8}', '{"gpu": []}', '{"gpus": [{"name": "H200"}]}'):
            with self.subTest(text), self.assertRaisesRegex(machine.BadDescription, "^not a recorded machine: .*$"):
                Machine.from_json(text)

    def test_memory(self):
        self.write("proc/meminfo", "MemTotal: 100 kB\nMemAvailable: 50 kB\n")
        self.assertEqual(machine.available_memory(self.root), 50 * 1024)
        self.write("sys/fs/cgroup/memory.max", "max\n")
        self.assertEqual(machine.available_memory(self.root), 50 * 1024)
        self.write("sys/fs/cgroup/memory.max", "40000\n")
        self.write("sys/fs/cgroup/memory.current", "30000\n")
        self.write("sys/fs/cgroup/memory.stat", "anon 1\ninactive_file 2000\n")
        self.assertEqual(machine.available_memory(self.root), 12000)

    def test_locked_memory(self):
        for capabilities, unlimited in (("000001ffffffffff", True), ("0000000000004000", True), ("0", False)):
            self.write("proc/self/status", f"Name: x\nCapEff:\t{capabilities}\n")
            with mock.patch("resource.getrlimit", return_value=(4096, 8192)):
                self.assertEqual(machine.observe(self.root, gpus=False).locked_bytes, -1 if unlimited else 8192)

    def test_rooms_and_limits(self):
        needed = replace(NEEDS, servers=[replace(server, transfer_backend="nixl") for server in PAIR])
        self.assert_fine(checks.of_machine(needed, NODE))
        for facts, level, *says in (
            ({"memory_bytes": 4 * GIB}, Level.ERROR, "memory: needs 16 GiB free, found 4;"),
            ({"shm_bytes": 64 << 20}, Level.ERROR, "/dev/shm: needs 8 GiB free, found 0.06;", "--shm-size"),
            ({"tmp_bytes": GIB}, Level.ERROR, "temporary files", "TMPDIR"),
            ({"home_bytes": GIB}, Level.ERROR, "home", "kernels"),
            ({"open_files": 512}, Level.ERROR, "open files: hard limit 512", "ulimit -Hn"),
            ({"open_files": 20000}, Level.WARNING, "open files: hard limit 20000", "65535"),
        ):
            self.assert_one(checks.of_machine(needed, replace(NODE, **facts)), level, *says)

    def test_a_pair_on_cpu(self):
        pair, unit = Needs("cpu", embedded=True), Needs("cpu")
        small = replace(NODE, gpus=(), memory_bytes=6 * GIB, shm_bytes=64 << 20, tmp_bytes=GIB, open_files=1024)
        self.assert_fine(checks.of_machine(pair, small))
        for facts, says in (
            ({"memory_bytes": 5 * GIB}, "needs 6 GiB free, found 5;"),
            ({"memory_bytes": 6 * GIB - 1}, "memory: needs 6 GiB free, found 5.99;"),
            ({"shm_bytes": 0}, "/dev/shm: needs 16 MiB free, found 0;"),
            ({"open_files": 256}, "open files"),
        ):
            self.assert_one(checks.of_machine(pair, replace(small, **facts)), Level.ERROR, says)
        self.assertEqual(list(checks.of_machine(unit, Machine())), [])


class TestRdma(CheckCase):
    """By the rules of the installed fixture, on trees like those of /sys/class/infiniband."""

    def device(self, name="mlx5_0", state="4: ACTIVE", rate="400 Gb/sec (4X NDR)", link="InfiniBand", **gids):
        port = f"sys/class/infiniband/{name}/ports/1"
        for file, text in (("state", state), ("rate", rate), ("link_layer", link)):
            self.write(f"{port}/{file}", text + "\n")
        for index, (kind, gid) in gids.items():
            self.write(f"{port}/gid_attrs/types/{index[1:]}", kind + "\n")
            self.write(f"{port}/gids/{index[1:]}", gid + "\n")

    def found(self, nics=(), environ=None, backend="mooncake", **facts):
        pair = [replace(server, nics=nics, transfer_backend=backend) for server in PAIR]
        seen = replace(NODE, rdma=machine.observe(self.root, gpus=True).rdma, **facts)
        found = checks.of_machine(replace(NEEDS, servers=pair), seen, environ or {})
        return [finding for finding in found if finding.subject in ("RDMA", "locked memory")]

    def test_infiniband(self):
        self.device("mlx5_0")
        self.device("mlx5_1")
        self.assert_fine(self.found(nics=("mlx5_0", "mlx5_1")))
        self.assertIn("usable: mlx5_0, mlx5_1", [finding.what for finding in self.found()])

    def test_not_usable(self):
        for broken, reason in (
            ({"state": "1: DOWN"}, "state=1: DOWN"),
            ({"rate": "25 Gb/sec (1X EDR)"}, "rate=25 Gbps"),
            ({"name": "mlx5_eth0"}, "contains 'eth' in name"),
        ):
            with self.subTest(broken):
                shutil.rmtree(self.root / "sys", ignore_errors=True)
                self.device(**broken)
                name = broken.get("name", "mlx5_0")
                self.assert_one(self.found(), Level.WARNING, f"no usable device, {name} skipped ({reason})", "by TCP")
                self.device("mlx5_9")
                found = self.found(nics=(name, "mlx5_9"))
                self.assert_one(found, Level.ERROR, f"{name}: {reason}", "prefill and decode would get it")

    def test_none(self):
        self.assert_one(self.found(), Level.WARNING, "no usable device", "SGLANG_TEST_PD_DISAGG_BACKEND=nixl")
        self.assertEqual(self.found(backend="nixl"), [])

    def test_a_device_that_is_not_there(self):
        self.device("mlx5_0")
        self.assert_one(self.found(nics=("mlx5_roce0",)), Level.ERROR, "mlx5_roce0: no such device")
        shutil.rmtree(self.root / "sys")
        self.assert_one(self.found(nics=("mlx5_roce0", "mlx5_roce1")), Level.ERROR, "mlx5_roce0, mlx5_roce1: no such")

    def test_what_the_container_lacks(self):
        self.device()
        self.assert_one(self.found(rdma_openable=False), Level.WARNING, "no /dev/infiniband/uverbs*", "--device")
        self.assert_one(self.found(locked_bytes=8 << 20), Level.WARNING, "locked memory: limit 8 MiB", "memlock=-1")

    def test_roce(self):
        local, routed = ("RoCE v2", "fe80::1"), ("RoCE v2", "::ffff:10.0.0.1")
        self.device("mlx5_0", link="Ethernet", g0=("IB/RoCE v1", "fe80::1"), g1=local, g3=routed)
        self.assert_fine(self.found())
        self.device("mlx5_1", link="Ethernet", g0=("IB/RoCE v1", "fe80::1"))
        self.assert_one(self.found(), Level.ERROR, "no RoCE v2 GID on mlx5_1", "score is 0", "address")
        self.assert_fine(self.found(nics=("mlx5_0",)))
        self.assert_fine(self.found(environ={"MC_GID_INDEX": "3"}))
        self.device("mlx5_1", link="Ethernet", g5=routed)
        self.assert_one(self.found(), Level.WARNING, "different indices", "MC_GID_INDEX")

    def test_rules_of_the_fixture(self):
        self.device("mlx5_0", link="Ethernet", g1=("RoCE v2", "fe80::1"), g3=("RoCE v2", "::ffff:10.0.0.1"))
        rules = rdma.rules(packages.locate("sglang").parent / rdma.FIXTURE, self.root)
        self.assertEqual((rules.usable(), rules.gid_index(["mlx5_0"])), (("mlx5_0",), 3))

    def test_a_release_without_rule_for_gids(self):
        fixture = self.write("fixture.py", 'def _get_available_ib_devices():\n    return ["mlx5_0"]\n')
        self.assertFalse(rdma.rules(fixture, self.root).knows_gids)
        with self.assertRaises(KeyError):
            rdma.rules(self.write("other.py", "x = 1\n"), self.root)


class TestPackages(CheckCase):
    def site(self, *modules, backend_source="from sgl_kernel.flash_mla import x"):
        for module in modules:
            parts = module.split(".")
            for depth in range(1, len(parts)):
                self.write("/".join([*parts[:depth], "__init__.py"]), "raise ImportError('imported')")
            self.write("/".join(parts) + ".py", "raise ImportError('imported')")
        self.write("sglang/__init__.py")
        self.write("sglang/srt/layers/attention/deepseek_v4_backend.py", f"def f():\n    {backend_source}\n")
        return [str(self.root)]

    def found(self, a2a, backend, is_dsv4, site):
        return [packages.installed(package, site) for package in packages.wanted(a2a, backend, is_dsv4, site)]

    ALL = ("sgl_kernel.flash_mla", "deep_ep", "deep_gemm", "mooncake.engine", "sglang_router")

    def test_all_there_and_none_imported(self):
        self.assert_fine(self.found("deepep", "mooncake", True, self.site(*self.ALL)))

    def test_each_missing(self):
        for missing, says in (
            ("deep_ep", "--moe-a2a-backend deepep"),
            ("deep_gemm", "experts"),
            ("mooncake.engine", "--disaggregation-transfer-backend mooncake"),
            ("sglang_router", "load balancer"),
            ("sgl_kernel.flash_mla", "FlashMLA"),
        ):
            with self.subTest(missing):
                shutil.rmtree(self.root)
                site = self.site(*(module for module in self.ALL if module != missing), "sgl_kernel.other")
                self.assert_one(self.found("deepep", "mooncake", True, site), Level.ERROR, missing, says)

    def test_what_is_there_is_imported_where_gpus_are(self):
        self.write("torch.py")
        self.write("sglang_router.py", "import torch")
        self.write("deep_gemm.py", "raise OSError('libcudart.so.12: no such file')")
        imports = "try:\n    import deep_gemm\nexcept OSError as e:\n    raise ImportError('no') from e"
        self.write("mooncake/__init__.py")
        self.write("mooncake/engine.py", imports)
        self.write("flash_mla.py", "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
        self.write("deep_ep.py", "import sys\nassert 'torch' in sys.modules, 'SGLang imports torch first'")
        paths = mock.patch.object(sys, "path", [str(self.root), *sys.path])
        environ = mock.patch.dict(os.environ, PYTHONPATH=str(self.root))
        launched = Needs("cuda", servers=[Server("prefill", transfer_backend="mooncake", a2a="deepep")])
        fine = packages.ROUTER, packages.Package("deep_ep", "", "")
        with paths, environ:
            for module, says in (
                ("deep_gemm", "OSError: libcudart.so.12: no such file"),
                ("mooncake.engine", "OSError: libcudart.so.12: no such file"),
                ("flash_mla", "exit code -11"),
            ):
                package = packages.Package(module, "it is needed", "install it")
                found = packages.importable([package, *fine, packages.Package("not_there", "", "")])
                line = self.assert_one(found, Level.ERROR, f"{module} cannot be imported: {says}; it is needed; ")
                self.assertTrue(line.endswith(f"{sys.executable} -c 'import torch, {module}'"), line)
            for has_gpus in (False, True):
                lines = [str(finding) for finding in checks.of_place(launched, has_gpus=has_gpus)]
                told = [line for line in lines if line.startswith("package: deep_gemm cannot be imported")]
                self.assertEqual(len(told), has_gpus, lines)

    def test_only_what_the_flags_need(self):
        site = self.site("sgl_kernel", "sglang_router")
        self.assert_fine(self.found("none", "fake", False, site))
        self.assert_one(self.found(None, "nixl", False, site), Level.ERROR, "nixl._api is not installed", "nixl")

    def test_a_release_whose_indexer_reads_out_of_bounds(self):
        def told(release, environ=None, model="DeepSeek-V4-Flash", **env):
            known = {"installed": lambda _: release}
            with mock.patch.multiple(checks, **known), mock.patch.multiple(quirks, **known):
                server = Server("prefill", models=(model,), env=env or quirks.indexer_environment())
                found = checks.of_place(Needs("cuda", servers=(server,)), environ or {})
                return [str(finding) for finding in found if finding.subject == "sglang"]

        switch = "SGLANG_OPT_USE_JIT_INDEXER_METADATA"
        for release in ("0.5.12", "0.5.15", "0.5.16", "0.5.17"):
            (line,) = told(release, **{switch: "1"})
            for says in (release, "128 tokens", "illegal memory access", f"export {switch}=0", "0.5.18"):
                self.assertIn(says, line)
            self.assertEqual(told(release), [])
            self.assertEqual(told(release, {switch: "false"}, OTHER="1"), [])
            self.assertEqual(len(told(release, {switch: "true"}, OTHER="1")), 1)
            self.assertEqual(told(release, model="Llama", **{switch: "1"}), [])
        for release in ("0.5.13", "0.5.14", "0.5.18", "0.5.23", None):
            self.assertEqual(told(release, **{switch: "1"}), [])

    def test_flash_mla_of_a_release(self):
        for source, modules in (
            ("from flash_mla.flash_mla_interface import FlashMLASchedMeta", ("flash_mla",)),
            ("import sgl_kernel.flash_mla as flash_mla", ("sgl_kernel.flash_mla",)),
            ("from sglang.kernels.ops.attention import flash_mla_interface", ()),
        ):
            self.site(backend_source=source)
            self.assertEqual(packages.flash_mla_modules(self.root / "sglang"), modules)
        self.assertTrue(packages.flash_mla_modules(packages.locate("sglang").parent))

    def test_locate(self):
        self.assertIsNone(packages.locate("no_such_package.module"))
        self.assertIsNone(packages.locate("json.no_such_module"))
        self.assertIsNone(packages.locate("this.that"))
        self.assertEqual(packages.locate("json.decoder"), Path(json.decoder.__file__))
        self.assertNotIn("this", sys.modules)


WEIGHTS = save({"a": numpy.zeros((3, 5), "float32"), "b": numpy.zeros(7, "int8")})


class TestModel(CheckCase):
    REPO = "sgl-project/DeepSeek-V4-Flash-FP8"

    def setUp(self):
        super().setUp()
        self.environ = {"HF_HUB_CACHE": str(self.root)}
        self.repository = self.root / f"models--{self.REPO.replace('/', '--')}"
        self.snapshot = self.repository / "snapshots" / "abc"
        self.blobs = self.repository / "blobs"
        for folder in (self.snapshot, self.blobs, self.repository / "refs"):
            folder.mkdir(parents=True)
        (self.repository / "refs" / "main").write_text("abc")
        shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
        index = json.dumps({"metadata": {}, "weight_map": {f"w{i}": name for i, name in enumerate(shards)}})
        files = {"config.json": '{"model_type": "deepseek_v4"}', "tokenizer.json": "{}"}
        files |= {"model.safetensors.index.json": index} | dict.fromkeys(shards, WEIGHTS)
        for number, (name, content) in enumerate(files.items()):
            blob = self.blobs / str(number)
            blob.write_bytes(content if isinstance(content, bytes) else content.encode())
            (self.snapshot / name).symlink_to(blob)
        self.shard = self.snapshot / shards[1]

    def check(self, name=REPO, **kwargs):
        return list(model.check(name, self.environ, **kwargs))

    def test_complete(self):
        self.assert_fine(self.check())
        self.assert_fine(self.check(str(self.snapshot)))

    def test_a_missing_shard(self):
        self.shard.resolve().unlink()
        self.assert_one(self.check(), Level.ERROR, "1 of 3 shards missing: model-00002")
        self.shard.unlink()
        says = (f"{self.REPO}: 1 of 3 shards missing: model-00002-of-00003.safetensors", f"hf download {self.REPO}")
        self.assert_one(self.check(), Level.ERROR, *says)
        self.assert_fine(self.check(weights=False))

    def test_a_shard_that_was_cut_off(self):
        whole = self.shard.read_bytes()
        for size in (len(whole) - 1, 20, 4, 0):
            self.shard.resolve().write_bytes(whole[:size])
            self.assert_one(self.check(), Level.ERROR, self.shard.name, f"{size}")
        self.shard.resolve().write_bytes(b"\x02\0\0\0\0\0\0\0[]")
        self.assert_one(self.check(), Level.ERROR, self.shard.name, "no safetensors file")

    def test_other_files(self):
        for name, text, says in (
            ("config.json", None, "config.json is missing"),
            ("config.json", "{", "config.json is not JSON"),
            ("tokenizer.json", None, "no tokenizer"),
            ("model.safetensors.index.json", "{}", "has no weight_map"),
            ("model.safetensors.index.json", "not json", "has no weight_map"),
        ):
            with self.subTest(name, text=text):
                path = self.snapshot / name
                whole = path.read_text()
                path.unlink()
                if text is not None:
                    path.write_text(text)
                self.assert_one(self.check(), Level.ERROR, says)
                path.write_text(whole)
                self.assert_fine(self.check())

    def test_one_file_and_none(self):
        for path in self.snapshot.glob("model*"):
            path.unlink()
        self.assert_one(self.check(), Level.ERROR, "no weights")
        (self.snapshot / "model.safetensors").write_bytes(WEIGHTS)
        self.assert_fine(self.check())

    def test_not_in_the_cache(self):
        self.assert_one(self.check("a/b"), Level.ERROR, "a/b is not in the cache", "hf download a/b")
        self.assert_one(self.check("/no/such/model"), Level.ERROR, "/no/such/model: no such directory")
        (self.repository / "refs" / "main").unlink()
        self.assert_one(self.check(), Level.ERROR, "is not in")

    def test_the_random_checkpoint_that_a_test_makes_when_it_begins(self):
        with mock.patch.dict(os.environ, PDKIT_CACHE_DIR=str(self.root)):
            random, trained = store.cached("random"), store.cached("trained")
            self.assert_fine(self.check(str(random)))
            self.assert_one(self.check(str(trained)), Level.ERROR, f"{trained}: no such directory")
            self.write("kernel-nano/random/config.json")
            self.assert_fine(self.check(str(random)))
            self.write("kernel-nano/random/model.safetensors")
            self.assertIn("config.json is not JSON", [str(finding) for finding in self.check(str(random))][0])

    def test_is_dsv4(self):
        self.assertTrue(dsv4.is_dsv4("x", self.snapshot))
        self.write("other/config.json", '{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
        self.assertFalse(dsv4.is_dsv4(self.REPO, self.root / "other"))
        self.assertTrue(dsv4.is_dsv4(self.REPO, None))
        self.assertFalse(dsv4.is_dsv4("meta-llama/Llama-3.1-8B", None))


class TestDataset(CheckCase):
    ROW = '{"question": "1 + 1?", "answer": "#### 2"}\n'

    def test_a_file(self):
        path = self.write("data.jsonl", self.ROW * 3)
        self.assert_fine(dataset.check(str(path)))
        for text, says in (
            ("", ": no questions"),
            ("what?\n", ", line 1 is not JSON"),
            (self.ROW + '{"question": "?"}\n', ", line 2 has no texts 'question' and 'answer'"),
            ("[]\n", ", line 1 has no texts"),
            ("3\n", ", line 1 has no texts"),
        ):
            path.write_text(text)
            self.assert_one(dataset.check(str(path)), Level.ERROR, f"{path}{says}", "SGLANG_PD_GSM8K")
        self.assert_one(dataset.check("/no/such.jsonl"), Level.ERROR, "/no/such.jsonl: No such file or directory")

    def test_the_data_of_sglang(self):
        self.assertRegex(dataset.default_url(), r"^https://.*gsm8k.*|^https://.*grade.school.math.*\.jsonl$")
        name = dataset.default_url().rpartition("/")[2]
        for answers, level in ((True, None), (False, Level.ERROR)):
            with mock.patch.object(dataset, "reachable", return_value=answers):
                found = list(dataset.check(None, self.root, {}))
                (self.assert_one(found, level, name, "does not answer") if level else self.assert_fine(found))
        self.assert_one(dataset.check(None, self.root, {"https_proxy": "p"}), Level.WARNING, "through the proxy")
        self.write(name, self.ROW)
        self.assert_fine(dataset.check(None, self.root, {}))
        self.write(name, "<html>")
        self.assert_one(dataset.check(None, self.root, {}), Level.ERROR, name, "remove it")

    def test_reachable(self):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            self.assertTrue(dataset.reachable("127.0.0.1", port))
        self.assertFalse(dataset.reachable("127.0.0.1", port))


class TestPlace(CheckCase):
    def test_a_port_in_use_is_named(self):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            needed = Needs("cuda", ports={port: "decode nccl"})
            found = [finding for finding in checks.of_place(needed) if finding.subject == "ports"]
            self.assert_one(found, Level.ERROR, f"{port} is in use by pid {os.getpid()} (", "decode nccl")
        found = [finding for finding in checks.of_place(needed) if finding.subject == "ports"]
        self.assert_fine(found)

    def test_what_sglang_refuses(self):
        lines = {"errors": ("T: no such flag",), "deprecations": ("T: old flag",), "warnings": ("T: port 1; choose 2",)}
        found = [f for f in checks.of_place(Needs("cuda", **lines)) if f.subject in ("contract", "plan")]
        self.assertEqual([finding.level for finding in found], [Level.ERROR, Level.OK, Level.WARNING])
        self.assertEqual((found[2].what, found[2].do), ("T: port 1", "choose 2"))

    def test_the_same_of_several_classes_is_one_line(self):
        lines = ("A: prefill: --x", "B: prefill: --x", "A: decode: --x", "B: prefill: --x")
        self.assertEqual(needs.merged(lines), ("A, B: prefill: --x", "A: decode: --x"))

    def test_python3(self):
        def assert_says(*says):
            self.assert_one(checks.of_place(Needs("cpu"), environ), Level.ERROR, *says, "ln -s")

        environ = {"PATH": "/nowhere"}
        self.assert_fine(checks.of_place(Needs("cpu"), environ))
        with mock.patch.object(sys, "executable", str(self.root / "python3.11")):
            assert_says("python3: not found")
            environ = {"PATH": os.environ["PATH"]}
            assert_says("python3: /")
            self.write("python3.11")
            self.write("python3").chmod(0o755)
            assert_says(f"python3: {self.root}/python3")

    def test_the_embedded_engine(self):
        pair = Needs("cpu", embedded=True)
        self.assert_fine(checks.of_place(pair))
        shutil.copytree(checks.ASSETS, self.root / "assets")
        with mock.patch.object(checks, "ASSETS", self.root / "assets"):
            self.assert_fine(checks.of_place(pair))
            (self.root / "assets" / "nano-dsv4" / "model.safetensors").unlink()
            self.assert_one(checks.of_place(pair), Level.ERROR, "no weights")
        with mock.patch.object(checks, "ASSETS", self.root):
            errors = [finding.subject for finding in checks.of_place(pair) if finding.level is Level.ERROR]
            self.assertEqual(errors, ["model", "data"])


def registration(path, hw="cuda", suite=GPU_SUITE):
    return Registration(str(path), path.name, hw, suite, 10)


class TestNeeds(CheckCase):
    def test_dsv4_on_8_h200(self):
        """tp 4 and dp 4 with DP attention on each side are 8 GPUs."""
        found = needs.of([registration(DSV4)], {"SGLANG_PD_GSM8K": "/data.jsonl"})
        self.assertEqual((found.gpu_count, found.gpu_memory_gb, found.capability), (8, 141, (9, 0)))
        servers = {server.name: server for server in found.servers}
        self.assertEqual(list(servers), ["prefill", "decode"])
        self.assertEqual((servers["prefill"].gpus, servers["decode"].gpus), ((0, 1, 2, 3), (4, 5, 6, 7)))
        self.assertEqual({servers[side].a2a for side in ("prefill", "decode")}, {"deepep"})
        self.assertEqual(servers["prefill"].mem_fraction, 0.7)
        self.assertEqual((len(found.ports), [*found.ports.values()][-1]), (18, "load balancer http"))
        self.assertEqual((found.data, found.errors), (("/data.jsonl",), ()))
        self.assertEqual(needs.of([registration(DSV4)], {}).data, (None,))

    def test_a_monolithic_server_beside_the_pair_hands_nothing_over(self):
        path = DSV4.with_name("test_disaggregation_dsv4_1gpu_nixl.py")
        found = needs.of([registration(path, suite="stage-b-test-1-gpu-large")])
        backends = {server.name: server.transfer_backend for server in found.servers}
        self.assertEqual((backends["prefill"], backends["decode"], backends["server"]), ("nixl", "nixl", None))

    def test_ways_to_name_the_data(self):
        environ = {"DATA": "/data.jsonl"}
        ways = (
            ('"/a.jsonl"', "/a.jsonl"),
            ("None", None),
            ('os.getenv("DATA")', "/data.jsonl"),
            ('os.environ.get("OTHER", "/b.jsonl")', "/b.jsonl"),
            ('os.getenv("OTHER") or None', None),
            ('os.getenv("DATA") or "/a.jsonl"', "/data.jsonl"),
            ("sys.argv[0]", UNKNOWN),
            ("sys.argv[0] or None", UNKNOWN),
        )
        for number, (value, path) in enumerate(ways):
            name = f"test_{number}.py"
            source = "class T(PDDisaggregationServerBase):\n    gsm8k_data_path = " + value
            (cls,) = read(self.write(name, source + "\n    def test_it(self): pass\n")).classes.values()
            self.assertEqual(needs._data(cls, environ), [path], value)
        found = checks.of_place(Needs("cuda", data=(UNKNOWN,)))
        self.assert_one([finding for finding in found if finding.subject == "data"], Level.WARNING, "is computed")

    def test_what_contract_and_plan_find(self):
        source = DSV4.read_text().replace("--mem-fraction-static 0.7", "--mem-fraction-statik 0.7")
        path = self.write("test_it.py", source.replace("--tp 4 --dp 4", "--tp 5 --dp 5"))
        for nic, node in (("mlx5_0", 0), ("mlx5_4", 1)):
            self.write(f"sys/class/infiniband/{nic}/device/numa_node", f"{node}\n")
        self.enterContext(mock.patch.dict(os.environ, SGLANG_TEST_PD_DISAGG_DEVICES="mlx5_0,mlx5_4"))
        self.enterContext(mock.patch.object(needs, "gpu_sockets", lambda sysfs: {0: 0, 5: 1}))
        found = needs.of([registration(path)], root=self.root)
        for lines, pattern, count in (
            (found.errors, "--mem-fraction-statik: no such flag; nearest: --mem-fraction-static", 1),
            (found.errors, r"needs 9 GPUs \(0-8\), the runner is 8-gpu-h200", 1),
            (found.errors, "prefill and decode .*GPU 4", 1),
            (found.warnings, "prefill: NIC mlx5_4 sits on another socket than its GPUs 0-4", 1),
            (found.warnings, "another socket", 2),
        ):
            self.assertEqual(len([line for line in lines if re.search(pattern, line)]), count, lines)

    def test_a_pair_on_cpu(self):
        embedded = DSV4.with_name("test_disaggregation_dsv4_embedded.py")
        self.assertEqual(needs.of([registration(embedded, "cpu", "stage-a-test-cpu")]), Needs("cpu", embedded=True))
        self.assertEqual(needs.of([registration(Path(__file__), "cpu", "stage-a-test-cpu")]), Needs("cpu"))

    def test_a_file_that_launches_nothing(self):
        found = needs.of([registration(Path(__file__), suite="stage-b-test-2-gpu-large")])
        self.assertEqual(found, Needs("cuda", 2))

    def test_the_same_plan_on_fewer_gpus(self):
        needed = needs.of([registration(DSV4)], {})
        for width in (1, 2):
            first = {"prefill": 0, "decode": width}
            narrow = tuple(replace(s, tp=width, attention_dp=1, base_gpu_id=first[s.name]) for s in needed.servers)
            wanted = replace(needed, gpu_count=2 * width, servers=narrow)
            enough, short = (replace(WITH_NICS, gpus=(H200,) * n) for n in (2 * width, 2 * width - 1))
            self.assert_fine(checks.of_machine(wanted, enough, {}))
            self.assert_one(checks.of_machine(wanted, short, {}), Level.ERROR, f"the suite needs {2 * width} GPUs")


class TestCommands(CheckCase):
    def run_command(self, *words, **environ):
        environ = without("SGLANG_", "HF_") | environ
        return forked.run([sys.executable, *map(str, words)], env=environ, has_fork_server=words[0] == RUN_SUITE)

    @unittest.skipIf(os.path.exists("/dev/nvidiactl"), "this machine has a driver")
    def test_gpu_suite_on_a_machine_without_gpus(self):
        model_dir = self.write("model/config.json", "{}").parent
        environ = {"SGLANG_PD_MODEL": str(model_dir), "SGLANG_PD_GSM8K": str(self.root / "data.jsonl")}
        done = self.run_command(*COMMAND, **environ)
        self.assertEqual((done.returncode, done.stderr), (3, ""))
        lines = [line for line in done.stdout.splitlines() if line.startswith("error")]
        for pattern in (
            r"GPUs: 0 found, no NVIDIA driver .*; the suite needs 8 GPUs of 141 GB \(prefill 0-3, decode 4-7\); run",
            r"model: .*/model: no weights \(\*\.safetensors\); ",
            r"model: .*/model: no tokenizer ",
            r"data: .*/data\.jsonl: No such file or directory; ",
        ):
            self.assertEqual(len([line for line in lines if re.search(pattern, line)]), 1, done.stdout)
        refused = self.run_command(RUN_SUITE, "--hw", "cuda", "--suite", GPU_SUITE, **environ)
        self.assertEqual(refused.returncode, 3)
        reported = [line.removeprefix("run_suite.py: error: ") for line in refused.stderr.splitlines()]
        subjects = [[line.split(":")[0] for line in report] for report in (reported, lines)]
        said, listed = ([s.removeprefix("error").strip() for s in subject if "memory" not in s] for subject in subjects)
        self.assertEqual(said, listed)  # free memory may have changed in between
        self.assertNotIn("Traceback", refused.stdout)

    def test_a_recorded_machine(self):
        ready = self.write("ready.json", WITH_NICS.to_json())
        done = self.run_command(*COMMAND, "--machine", str(ready))
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        levels = [line.split()[0] for line in done.stdout.splitlines()]
        self.assertEqual((set(levels[:-1]), levels[-1]), ({"ok"}, "not"), done.stdout)
        for line in (
            "GPUs: 8 found (NVIDIA H200), 8 GPUs of 141 GB needed",
            "GPUs 0-3: 143000 of 143771 MiB free for prefill",
            "GPUs 4-7: 143000 of 143771 MiB free for decode",
            f"RDMA: usable: {', '.join(NICS)}",
        ):
            self.assertRegex(done.stdout, rf"(?m)^ok +{re.escape(line)}$")
        seven = self.write("seven.json", replace(NODE, gpus=NODE.gpus[1:]).to_json())
        done = self.run_command(*COMMAND, "--machine", str(seven), "--json")
        self.assertEqual(done.returncode, 3)
        errors = [finding["what"] for finding in json.loads(done.stdout) if finding["level"] == "error"]
        self.assertEqual(errors, ["7 found"])

    def test_record(self):
        done = self.run_command(*COMMAND, "--record")
        self.assertEqual(done.returncode, 0)
        self.assertGreater(Machine.from_json(done.stdout).memory_bytes, 0)

    def test_run_suite_starts_no_file_on_a_machine_that_cannot(self):
        source = source_of(registration='register_cuda_ci(1, "stage-b-test-64-gpu-large")')
        tree = write_tree(self.root, {"test_it.py": source})
        words = ["--test-root", str(tree), "--hw", "cuda", "--suite", "stage-b-test-64-gpu-large"]
        done = self.run_command(RUN_SUITE, *words)
        self.assertEqual((done.returncode, done.stdout), (3, ""))
        self.assertEqual(len(done.stderr.splitlines()), 1, done.stderr)
        self.assertIn("run_suite.py: error: GPUs: 0 found", done.stderr)
        done = self.run_command(RUN_SUITE, *words, "--skip-environment-check")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("1 passed, 0 failed", done.stdout)


if __name__ == "__main__":
    unittest.main()
