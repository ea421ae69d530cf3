"""Reports of Nsight Systems: old and new names, and what `nsys stats` writes around them.

No nsys is here. Its place takes a program that answers as the documentation of `nsys stats` has it, under the names of
one version only, with columns as 2022.4 and 2024.2 write them.
"""

from pathlib import Path

import pytest
from click.testing import CliRunner

from kervan.cli.profile import profile
from kervan.errors import ConfigError, EngineError
from kervan.profile import nsys

NEW = """Generating SQLite file /tmp/a.sqlite from /tmp/a.nsys-rep
Processing [/tmp/a.sqlite] with [/opt/nsys/reports/cuda_gpu_kern_sum.py]...
Time (%),Total Time (ns),Instances,Avg (ns),Med (ns),Min (ns),Max (ns),StdDev (ns),Name
60.0,6000000,20,300000.0,1.0,1,2,0.0,"void cutlass::Kernel2<cutlass_80_gemm, (int)2>(T1::Params)"
30.0,3000000,10,300000.0,1.0,1,2,0.0,ncclDevKernel_AllReduce_Sum_bf16(ncclDevKernelArgs)
"""
OLD = """Processing [a.sqlite] with [gpukernsum.py]...

Time (%),Total Time (ns),Instances,Avg (ns),Med (ns),Min (ns),Max (ns),StdDev (ns),GridXYZ,BlockXYZ,Name
50.0,1000000,2,1.0,1.0,1,2,0.1, 896    1    1, 128 1 1,"void norm_kernel<float>(float *)"
50.0,1000000,3,1.0,1.0,1,2,0.1, 112    1    1, 128 1 1,"void norm_kernel<float>(float *)"
"""
COPIES = """Time (%),Total Time (ns),Count,Avg (ns),Med (ns),Min (ns),Max (ns),StdDev (ns),Operation
100.0,1000000,7,1.0,1.0,1,2,0.1,[CUDA memcpy Host-to-Device]
"""
RANGES = """Time (%),Total Time (ns),Instances,Avg (ns),Med (ns),Min (ns),Max (ns),StdDev (ns),Style,Range
75.0,3000000,3,1.0,1.0,1,2,0.1,PushPop,:forward
25.0,1000000,3,1.0,1.0,1,2,0.1,PushPop,:sampling
"""


def installed(directory: Path, monkeypatch: pytest.MonkeyPatch, reports: dict[str, str]) -> Path:
    """A report, and an nsys that knows these of its reports."""
    for name, text in reports.items():
        (directory / name).write_text(text)
    program = directory / "nsys"
    program.write_text(
        f'#!/bin/sh\n[ "$1 $2 $4 $5" = "stats --report --format csv" ] || exit 3\ncd {directory}\n'
        'if [ -f "$3" ]; then cat "$3"; else echo "ERROR: Report \'$3\' could not be found." >&2; exit 1; fi\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")
    report = directory / "a.nsys-rep"
    report.touch()
    return report


def test_reports_of_a_new_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports = {"cuda_gpu_kern_sum": NEW, "cuda_gpu_mem_time_sum": COPIES, "nvtx_sum": RANGES}
    report = installed(tmp_path, monkeypatch, reports)
    found = nsys.kernels(report)
    assert [(k.name, round(k.share, 9), k.calls, k.bound) for k in found] == [
        ("cutlass_80_gemm", 0.6, 20, "unknown"),
        ("ncclDevKernel_AllReduce_Sum_bf16", 0.3, 10, "communication"),
        ("[CUDA memcpy Host-to-Device]", 0.1, 7, "copies"),
    ]
    assert [(k.name, k.share, k.bound) for k in nsys.ranges(report)] == [
        (":forward", 0.75, "unknown"), (":sampling", 0.25, "unknown"),
    ]  # fmt: skip


def test_reports_of_an_old_version_and_of_a_run_without_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skipped = "SKIPPED: a.sqlite does not contain GPU memory data.\n"
    report = installed(tmp_path, monkeypatch, {"gpukernsum": OLD, "gpumemtimesum": skipped, "nvtxsum": skipped})
    (only,) = nsys.kernels(report)  # one kernel in two shapes
    assert (only.name, only.share, only.calls, only.bound) == ("norm_kernel", 1.0, 5, "memory")
    assert nsys.ranges(report) == ()


def test_the_command_prints_them_or_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports = {"cuda_gpu_kern_sum": NEW, "cuda_gpu_mem_time_sum": COPIES, "nvtx_sum": RANGES}
    report = installed(tmp_path, monkeypatch, reports)
    done = CliRunner().invoke(profile, ["--nsys", str(report)])
    assert done.exit_code == 0 and "  60.0%       20 x  cutlass_80_gemm\n" in done.stdout
    with pytest.raises(ConfigError, match=r"nsys profile -o NAME COMMAND writes NAME\.nsys-rep"):
        nsys.kernels(tmp_path / "none.nsys-rep")
    (tmp_path / "cuda_gpu_kern_sum").unlink()
    with pytest.raises(EngineError, match="ERROR: Report 'cuda_gpu_kern_sum' could not be found"):
        nsys.kernels(report)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="install Nsight Systems"):
        nsys.kernels(report)


def test_a_report_that_cannot_be_is_told_before_anything_else(tmp_path: Path) -> None:
    for path, told in ((tmp_path / "no.nsys-rep", "does not exist"), (tmp_path, "is no regular file")):
        ran = CliRunner().invoke(profile, ["--nsys", str(path)])
        assert isinstance(ran.exception, ConfigError)
        assert told in str(ran.exception)
        assert ran.output == ""
