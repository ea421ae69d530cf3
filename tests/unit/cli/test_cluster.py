"""`kervan cluster`: files where they were asked for, JSON for scripts, and one line for what makes no sense."""

from pathlib import Path

import pytest
import yaml
from harness.clusters import IMAGE
from harness.command_line import Kervan


@pytest.fixture
def kervan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Kervan:
    return Kervan(monkeypatch, capsys, "cluster")


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    path = tmp_path / "fleet.yaml"
    path.write_text("model: Qwen/Qwen3-8B\nname: chat\ntp: 2\npools: {on-demand: 2..4, spot: 0..6}\n")
    return path


def test_files_are_written_and_what_to_do_with_them_is_said(kervan: Kervan, fleet: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, said, err = kervan.run(
        "render", "--config", fleet, "--target", "kuberay", "--image", IMAGE, "--cloud", "gcp", "--gpus-per-node", 8,
        "--out", out,
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "on-demand: 1 node with 8 GPUs; 60 s to drain, 75 s to end" in said
    assert "spot nodes get 10 s to drain in place of drain_timeout_s=60: gcp gives 30 s of notice" in said
    assert f"kubectl -n default apply -f {out}" in said
    assert sorted(path.name for path in out.iterdir()) == [
        "10-fleet.yaml", "20-cluster.yaml", "30-start.yaml", "40-entry.yaml", "50-policies.yaml",
    ]  # fmt: skip


def test_json_says_what_was_made(kervan: Kervan, fleet: Path, tmp_path: Path) -> None:
    found = kervan.json("render", "--config", fleet, "--target", "systemd", "--gpus-per-node", 4, "--out", tmp_path)
    assert found["nodes"] == {"on-demand": {"least": 1, "most": 2}, "spot": {"least": 0, "most": 3}}
    assert found["grace"]["spot"] == {"drain_s": 60, "period_s": 75}
    assert "kervan-ray-spot.service" in found["files"]
    assert all((tmp_path / name).is_file() for name in found["files"])


def test_options_override_the_file(kervan: Kervan, fleet: Path, tmp_path: Path) -> None:
    kervan.json(
        "render", "--config", fleet, "--target", "compose", "--image", IMAGE, "--tp", 1, "--pool", "on-demand:2",
        "--pool", "spot:0", "--gpus-per-node", 2, "--out", tmp_path / "a",
    )  # fmt: skip
    settings = yaml.safe_load((tmp_path / "a" / "fleet.yaml").read_text())
    assert "tp" not in settings
    assert settings["pools"] == {"on-demand": "2", "spot": "0"}


def test_a_machine_of_the_table_says_its_gpus(kervan: Kervan, tmp_path: Path) -> None:
    found = kervan.json(
        "render", "m", "--replicas", "9", "--target", "ray-azure", "--image", IMAGE, "--region", "westus2",
        "--instance", "Standard_ND96isr_H100_v5", "--out", tmp_path,
    )  # fmt: skip
    assert found["nodes"] == {"on-demand": {"least": 2, "most": 2}}


RENDER = ("render", "m", "--target", "kuberay", "--image", IMAGE)
AWS = ("render", "m", "--target", "ray-aws", "--image", IMAGE, "--instance", "p5.48xlarge")
SLURM = ("render", "m", "--target", "slurm")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("render", "--target", "slurm"), "names no model; give MODEL"),
        (("render", "m", "--target", "kuberay"), "there is no image; build one from deploy/gpu.Dockerfile"),
        (("render", "m", "--target", "kuberay", "--image", "kervan:latest"), "names no version"),
        (("render", "m", "--target", "slurm", "--image", IMAGE), "--image is of --target kuberay, compose, ray-aws"),
        ((*RENDER, "--partition", "gpu"), "--partition is of --target slurm, and the target is kuberay"),
        ((*RENDER, "--zone", "=x"), "--zone '=x' names none"),
        ((*RENDER, "--zone", 'a b"c'), "--zone 'a b\"c' is no name of a zone"),
        ((*RENDER, "--zone", "a", "--zone", "a"), "--zone a is given 2 times; give it once"),
        ((*AWS, "--region", "us west"), "--region 'us west' is no name of a region"),
        (
            (*AWS, "--region", "eu-west-1", "--zone", "us-west-2a=subnet-0a"),
            "--zone us-west-2a is no zone of --region eu-west-1; write one like eu-west-1a",
        ),
        ((*AWS, "--region", "eu-west-1", "--zone", "eu-west-1a=x y"), "--zone eu-west-1a='x y' is no subnet of AWS"),
        ((*SLURM, "--partition", "a b\n#SBATCH --uid=0; rm"), "is no name of a partition; use letters"),
        (
            ("render", "m", "--target", "ray-azure", "--image", IMAGE, "--instance", "Standard_ND96isr_H100_v5",
             "--region", "westus2", "--zone", "westus2-1"),
            "--zone westus2-1 is no zone of --region westus2; write one like 1",
        ),
        ((*SLURM, "--partition", ""), "--partition '' is no name of a partition"),
        ((*SLURM, "--time-limit", "1e300h"), "--time-limit '1e300h' is more than 10 years"),
        ((*RENDER, "--tp", "16", "--gpus-per-node", "8"), "a node has 8; use --gpus-per-node 16, or --tp 8"),
        ((*RENDER, "--instance", "x1"), "--instance x1 is not in the table of machines"),
        ((*RENDER, "--instance", "p5.48xlarge", "--gpus-per-node", "4"), "a p5.48xlarge has 8 GPUs"),
        ((*RENDER, "--namespace", "A"), "--namespace 'A' is no name of a namespace"),
        ((*RENDER, "--replicas", "2", "--pool", "spot:1"), "both set the number of replicas; give only the pools"),
        ((*RENDER, "--pool", "sport:1"), "pool 'sport' is not one of on-demand, spot"),
        ((*RENDER, "--memory-per-node", "1KiB"), "is below 1 GiB; write for example --memory-per-node 512GiB"),
        ((*RENDER, "--with", "grafana"), "--with 'grafana' is none of servicemonitor, dcgm"),
        (("render", "m", "--target", "slurm", "--time-limit", "5s"), "is below a minute"),
        (("render", "m", "--target", "compose", "--image", IMAGE, "--replicas", "2", "--gpus-per-node", "1"), "needs 2"),
        (("cost",), "there is no on-demand price; give --gpu, like --gpu H200, or --price 4/h"),
        (("cost", "--gpu", "V100"), "no spot price of V100 is known; give one, like --spot-price 1.50/h"),
        (("cost", "--gpu", "H200", "--pool", "on-demand:2"), "there is no spot node to compare with"),
        (("cost", "--gpu", "H200", "--spot", "zone=1"), "'zone=1' is none of zones="),
        (("cost", "--price", "4/h,5/h", "--spot-price", "1/h"), "names 2 prices; give one"),
        (("cost", "--price", "cheap", "--spot-price", "1/h"), "is not an amount of US dollars"),
    ],
)  # fmt: skip
def test_wrong_values_are_told_in_one_line(kervan: Kervan, words: tuple[str, ...], told: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = ("--out", out) if words[0] == "render" else ()
    assert told in kervan.fails(*words, *more)
    assert not out.exists()


@pytest.mark.parametrize(("place", "told"), [("no/such/out", "does not exist; make it first"), ("file", "is a file")])
def test_a_directory_that_cannot_be_written(kervan: Kervan, place: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert told in kervan.fails(*RENDER, "--out", tmp_path / place)


def test_an_empty_directory_is_not_the_current_one(
    kervan: Kervan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "--out '' is empty; give a path, or . for the current directory" in kervan.fails(*SLURM, "--out", "")
    assert not list(tmp_path.iterdir())


def test_all_files_are_written_or_none(kervan: Kervan, tmp_path: Path) -> None:
    (tmp_path / "40-entry.yaml").mkdir()
    assert f"{tmp_path}/40-entry.yaml is a directory" in kervan.fails(*RENDER, "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["40-entry.yaml"]
    assert "--out /proc/zz cannot be written" in kervan.fails(*SLURM, "--out", "/proc/zz")


def test_links_are_written_through_and_those_that_lead_nowhere_refused(kervan: Kervan, tmp_path: Path) -> None:
    out, kept = tmp_path / "out", tmp_path / "kept.yaml"
    out.mkdir()
    kept.touch()
    (out / "fleet.yaml").symlink_to(kept)
    kervan.json(*SLURM, "--out", out)
    assert (out / "fleet.yaml").is_symlink()
    assert yaml.safe_load(kept.read_text())["model"] == "m"
    kept.unlink()
    assert f"{out}/fleet.yaml is a link that leads nowhere" in kervan.fails(*SLURM, "--out", out)


COST = ("cost", "--price", "4/h", "--spot-price", "1/h,1.5/h", "--days", "1", "--seeds", "2")


def test_the_cost_of_the_mix_that_people_quote(kervan: Kervan) -> None:
    found = kervan.json(*COST)
    quoted = [one for one in found["mixes"] if one["mix"] == "2 on-demand + 6 spot"]
    assert [round(one["undisturbed_saving"], 4) for one in quoted] == [0.5625, 0.4688]  # 112 and 136 of 256
    assert all(one["saving_served"] < one["undisturbed_saving"] for one in quoted)
    assert found["spot_price_share_for_65_percent"] == pytest.approx(1 - 0.65 * 8 / 6)
    assert [one["availability"] for one in found["availability"]] == [0.3, 0.5, 0.7, 0.9, 0.97]
    assert found["market"]["zones"] == 3


def test_the_same_seed_costs_the_same_and_people_get_a_table(kervan: Kervan) -> None:
    code, said, err = kervan.run(*COST)
    assert (code, err) == (0, "")
    assert said == kervan.run(*COST)[1]
    assert "at most 75% can be saved, with spot for nothing; 65% needs spot at 13% of the on-demand price" in said


def test_prices_are_those_of_the_file_with_their_dates(kervan: Kervan) -> None:
    found = kervan.json("cost", "--gpu", "H200", "--days", "1", "--seeds", "1", "--gpus-per-node", "1")
    (first, *_) = found["mixes"]
    assert first["on_demand_usd_per_node_h"] == pytest.approx(7.912)
    assert any("AWS p5en.48xlarge, spot, 2026-08-06" in note for note in found["notes"])
