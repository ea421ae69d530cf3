"""`kervan doctor`: its lines, its JSON and its exit status."""

import json

import pytest
from click.testing import CliRunner
from harness.machines import machine, versions

from kervan.cli.doctor import doctor
from kervan.doctor import gather
from kervan.doctor.machine import Machine


def run(monkeypatch: pytest.MonkeyPatch, found: Machine, *words: str) -> tuple[int, str]:
    monkeypatch.setattr(gather, "machine", lambda *_, **__: found)
    done = CliRunner().invoke(doctor, words)
    return done.exit_code, done.stdout


def test_a_machine_in_order_is_exit_0_with_a_line_a_check(monkeypatch: pytest.MonkeyPatch) -> None:
    status, text = run(monkeypatch, machine())
    assert status == 0
    assert "pass    ray-version      Ray 2.60.0\n" in text
    assert "0 warn, 0 fail, 0 skipped" in text.splitlines()[-1]


def test_a_failed_check_is_exit_1_with_its_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    status, text = run(monkeypatch, machine(versions=versions(ray="2.59.0")))
    assert status == 1
    assert "fail    ray-version" in text
    assert "fix: pip install 'ray[serve]==2.60.0', on all nodes" in text


def test_checks_skipped_for_one_reason_share_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from harness import hosts

    _, text = run(monkeypatch, machine(host=hosts.host(gpus=(), pairs=()), num_pci_gpus=0))
    (line,) = (line for line in text.splitlines() if " gpu-kinds " in line)
    assert "(also mig, nvlink, " in line and " mig  " not in text


def test_its_json_has_the_checks_and_what_they_were_concluded_from(monkeypatch: pytest.MonkeyPatch) -> None:
    status, text = run(monkeypatch, machine(nofile=(1024, 1 << 20)), "--json")
    told = json.loads(text)
    assert (status, told["ok"], told["counts"]["fail"]) == (1, False, 1)
    (failed,) = (check for check in told["checks"] if check["verdict"] == "fail")
    assert failed["name"] == "nofile" and failed["fix"].startswith("ulimit -n")
    assert told["machine"]["nofile"] == [1024, 1 << 20]
