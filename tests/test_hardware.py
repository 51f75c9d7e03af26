"""What a device can do, and what is left of its memory: of the machine, of its control
groups, of a process.
"""

import os
import platform
import subprocess
import sys
import types

import pytest
import torch

from qwen_analog import hardware
from qwen_analog.hardware import GPUS, keep_freed_memory, peak_flops, peak_memory


def machine(path, files):
    """Files as the kernel shows them below `path`: /proc as "proc/...", control groups
    as "cgroup/...".
    """
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return {"proc": path / "proc", "cgroups": path / "cgroup"}


@pytest.mark.parametrize(
    "files, left",
    [
        ({}, 8000 * 1024),
        (
            {"cgroup/memory.max": "5000000", "cgroup/memory.current": "1000000"},
            4_000_000,
        ),
        ({"cgroup/memory.max": "max", "cgroup/memory.current": "1000000"}, 8000 * 1024),
        (
            {
                "cgroup/a/b/memory.max": "max",
                "cgroup/a/b/memory.current": "5",
                "cgroup/a/memory.max": "3000000",
                "cgroup/a/memory.current": "2000000",
                "cgroup/a/memory.stat": "anon 7\ninactive_file 500000\n",
            },
            1_500_000,
        ),
        (
            {
                "cgroup/memory.max": "5000000",
                "cgroup/memory.current": "4900000",
                "cgroup/memory.stat": (
                    "anon 100000\ninactive_file 800000\nactive_file 4000000\n"
                ),
            },
            4_900_000,
        ),
        ({"cgroup/memory.max": "1000000", "cgroup/memory.current": "2000000"}, 0),
        (
            {
                "proc/self/cgroup": "7:cpu,cpuacct:/x\n4:memory:/a\n0::/\n",
                "cgroup/memory/a/memory.limit_in_bytes": "6000000",
                "cgroup/memory/a/memory.usage_in_bytes": "2000000",
                "cgroup/memory/a/memory.stat": "total_inactive_file 1000000\n",
            },
            5_000_000,
        ),
        # a container without a name space of its own: the path is the host's, the
        # group's files are at the root
        (
            {
                "proc/self/cgroup": "4:memory:/docker/0123\n",
                "cgroup/memory/memory.limit_in_bytes": "2000000",
                "cgroup/memory/memory.usage_in_bytes": "500000",
            },
            1_500_000,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/\n",
                "cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
                "cgroup/memory/memory.usage_in_bytes": "500000",
            },
            8000 * 1024,
        ),
    ],
)
def test_what_is_left_is_the_least_of_the_machine_and_its_control_groups(
    tmp_path, files, left
):
    kernel = {
        "proc/meminfo": "MemTotal: 16000 kB\nMemFree: 10 kB\nMemAvailable: 8000 kB\n",
        "proc/self/cgroup": "0::/a/b\n",
    }
    assert hardware.available_memory("cpu", **machine(tmp_path, kernel | files)) == left


def test_where_the_kernel_says_nothing_the_machine_counts(tmp_path):
    left = hardware.available_memory("cpu", proc=tmp_path, cgroups=tmp_path)
    assert left == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_limit_of_addresses_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(
        hardware.resource,
        "getrlimit",
        lambda which: (
            (3_000_000, -1) if which == hardware.resource.RLIMIT_AS else (-1, -1)
        ),
    )
    page = os.sysconf("SC_PAGE_SIZE")
    kernel = {
        "proc/meminfo": "MemAvailable: 8000 kB\n",
        "proc/self/statm": "100 50 0 0 0 0 0\n",
    }
    assert (
        hardware.available_memory("cpu", **machine(tmp_path, kernel))
        == 3_000_000 - 100 * page
    )


def test_what_cannot_fit_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(hardware, "available_memory", lambda device: 2_000_000_000)
    with pytest.raises(ValueError) as refused:
        hardware.require_memory(
            12.3e9, "cpu", "training this model", "choose a smaller --model"
        )
    message = str(refused.value)
    assert all(
        part in message
        for part in (
            "training this model",
            "12.3 GB",
            "2.0 GB",
            "choose a smaller --model",
            "--ignore-memory",
        )
    )
    assert "\n" not in message
    hardware.require_memory(2e9, "cpu", "training this model", "-")
    hardware.require_memory(12.3e9, "cpu", "training this model", "-", check=False)


@pytest.mark.parametrize(
    "name, gpu",
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
    ],
)
def test_a_known_gpu_has_its_data_sheets_speed(monkeypatch, name, gpu):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == GPUS[gpu].flops


def test_an_unknown_gpu_is_measured(monkeypatch):
    """An RTX A1000 is no A100."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX A1000")
    monkeypatch.setattr(hardware, "_measured_flops", lambda device, dtype, size: 7.0)
    assert peak_flops(torch.device("cuda")) == 7.0
    assert peak_flops(torch.device("cuda"), torch.float32) == 7.0


@pytest.mark.parametrize("ratio, faster", [(2.0, True), (1.0, False), (0.1, False)])
def test_float32_is_faster_where_it_is(monkeypatch, ratio, faster):
    speeds = {torch.float32: ratio, torch.bfloat16: 1.0}
    asked = []

    def measured(device, dtype, size):
        asked.append(dtype)
        disturbed = asked.count(dtype) == 1 and dtype == torch.float32
        return speeds[dtype] / (10 if disturbed else 1)

    monkeypatch.setattr(hardware, "_measured_flops", measured)
    hardware.float32_is_faster.cache_clear()
    try:
        assert hardware.float32_is_faster() == faster
        first = len(asked)
        assert hardware.float32_is_faster() == faster and len(asked) == first
    finally:
        hardware.float32_is_faster.cache_clear()


def test_measuring_leaves_the_random_numbers_where_they_are():
    before = torch.get_rng_state()
    assert peak_flops(torch.device("cpu"), torch.float32) > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_the_peak_of_this_process_is_in_bytes():
    assert 2**26 < peak_memory(torch.device("cpu")) < 2**40


@pytest.mark.parametrize("system, unit", [("linux", 1024), ("darwin", 1)])
def test_peak_memory_is_in_bytes_on_each_system(monkeypatch, system, unit):
    usage = types.SimpleNamespace(ru_maxrss=5)
    monkeypatch.setattr(hardware.sys, "platform", system)
    monkeypatch.setattr(hardware.resource, "getrusage", lambda who: usage)
    assert peak_memory(torch.device("cpu")) == 5 * unit


FAULTS = """
import resource, sys, torch
from qwen_analog.hardware import keep_freed_memory

def faults():
    for size in (8, 16, 3, 12):
        torch.ones(size * 2**20)  # 4 bytes each
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

faults()
before = -faults() + faults()
kept = keep_freed_memory()
for _ in range(5):  # until there is a block of every size
    faults()
print(int(kept), before, -faults() + faults())
"""


def faults(**environment):
    clean = {n: v for n, v in os.environ.items() if not n.startswith("MALLOC_")}
    clean["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", FAULTS],
        env=clean | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return map(int, done.stdout.split())


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept_and_taken_again():
    kept, before, after = faults()
    assert kept and before > 20 * max(1, after)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_who_configured_the_memory_is_obeyed(name):
    value = "2" if name == "MALLOC_ARENA_MAX" else "glibc.malloc.arena_max=2"
    kept, before, after = faults(**{name: value})
    assert not kept and after > before / 2


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(hardware.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(hardware.ctypes, "CDLL", None)  # would fail when called
    assert keep_freed_memory() is False
