"""`kervan observe`: what it writes, and what it says of what it does not take."""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs

import pytest
import yaml

from kervan import cli


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["kervan", "observe", *words])
    status = 0
    try:
        cli.main()
    except SystemExit as end:
        status = int(end.code or 0)
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_a_namespace_that_kubernetes_would_refuse_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("render", str(tmp_path / "m"), "--scrape", "kubernetes", "--namespace", "X Y")
    status, _, said = run(monkeypatch, capsys, *words)
    assert (status, said.count("\n")) == (2, 1)
    assert "--namespace 'X Y' is no name of a namespace" in said


def test_render_writes_what_prometheus_and_grafana_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("render", str(tmp_path / "m"), "--target", "a:8000", "--objective", "0.999", "--json")
    status, out, _ = run(monkeypatch, capsys, *words)
    told = json.loads(out)
    assert (status, told["targets"]) == (0, ["a:8000"])
    assert all(Path(path).exists() for path in told["files"])
    config = yaml.safe_load((tmp_path / "m/prometheus.yml").read_text())
    assert config["scrape_configs"][0]["static_configs"][0]["targets"] == ["a:8000"]
    assert "0.0144" in (tmp_path / "m/rules/kervan.yml").read_text()


KUBERNETES = ("render", "m", "--scrape", "kubernetes", "--label")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("render", "m", "--target", "a"), "--target 'a' is not HOST:PORT"),
        (("render", "m", "--target", "a:1", "--objective", "100%"), "leaves no budget"),
        (("render", "m", "--target", "a:1", "--label", "a=b"), "--label is for --scrape kubernetes"),
        (("render", "no/where", "--target", "a:1"), "directory no does not exist"),
        (("render", "file", "--target", "a:1"), "is a file"),
        (("render", "", "--target", "a:1"), "DIR '' is empty; give a path"),
        (("render", "m", "--target", "hö st:8000"), "--target 'hö st:8000' is not HOST:PORT"),
        (("render", "m", "--target", "http://h:8000/x"), "is not HOST:PORT; write --target h:8000"),
        ((*KUBERNETES, "no equals"), "has no key=value form; write for example --label release=prometheus"),
        ((*KUBERNETES, "a b=c"), "--label 'a b' is no key of a label"),
        ((*KUBERNETES, "a=c d"), "--label a='c d' has no value of a label"),
        ((*KUBERNETES, "a=b", "--label", "a=c"), "--label gives a twice, 'b' and 'c'"),
        (("gpus", "--dcgm", ""), "--dcgm '' is not a server URL; write one like --dcgm http://127.0.0.1:9400/metrics"),
        (("gpus", "--dcgm", "ftp://x"), "--dcgm 'ftp://x' is not a server URL"),
        (("gpus", "--dcgm", "http://[x"), "is not a server URL"),
        (("gpus", "--every", "99999999999h"), "--every '99999999999h' is more than 10 years"),
        (("plot", ".", "--out", "x.svg", "--for", "1e300h"), "--for '1e300h' is more than 10 years"),
        (("plot", "--out", "x.svg"), "give either DIR or --prometheus URL"),
        (("plot", ".", "--prometheus", "http://h", "--out", "x.svg"), "give either DIR or --prometheus URL"),
        (("plot", "--prometheus", "http://h", "--out", "x.png"), "ends with neither .svg nor .html"),
        (("plot", "--prometheus", "ftp://h:9090", "--out", "x.svg"), "--prometheus 'ftp://h:9090' is not a server URL"),
        (("plot", "--prometheus", "http://h", "--out", "x.svg", "--for", "1s"), "is below 10 s"),
        (("plot", "--prometheus", "http://h", "--out", "x.svg", "--dashboard", "f"), "none of fleet, replica"),
    ],
)
def test_what_it_does_not_take_is_told_in_one_line(
    words: tuple[str, ...],
    why: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    status, _, err = run(monkeypatch, capsys, *words)
    assert status == 2
    assert why in err
    assert err.count("\n") == 1


class _Api(BaseHTTPRequestHandler):
    """A Prometheus in which every query gives one line, but those that ask for costs."""

    def do_GET(self) -> None:
        self._give({"yaml": "global:\n  scrape_interval: 1m30s\nscrape_configs:\n- scrape_interval: 5000ms\n"})

    def do_POST(self) -> None:
        asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        begin_s = float(asked["start"][0])
        line = {"metric": {"fleet": "f"}, "values": [[begin_s, "1"], [begin_s + 5, "NaN"], [begin_s + 10, "2.5"]]}
        self.asked.append(asked["query"][0])  # type: ignore[attr-defined]
        self._give({"result": [] if "cost" in asked["query"][0] else [line]})

    def _give(self, data: object) -> None:
        body = json.dumps({"status": "success", "data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_plot_draws_what_prometheus_has_and_names_what_it_has_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    handler = type("Api", (_Api,), {"asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url, out = f"http://127.0.0.1:{server.server_address[1]}", tmp_path / "fleet.html"
        words = ("plot", "--prometheus", url, "--out", str(out), "--fleet", "f", "--for", "10min", "--json")
        status, printed, err = run(monkeypatch, capsys, *words)
        server.shutdown()
    assert (status, err) == (0, "")
    assert json.loads(printed)["empty"] == ["Cost per hour"]
    assert out.read_text().startswith("<!doctype html>")
    assert all('fleet=~"f"' in query for query in asked)
    # Points of 3 s and scrapes of 5 s: as Grafana, four scrapes.
    assert any("[20000ms]" in query for query in asked)


def test_labels_that_kubernetes_takes_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--label", "release=prometheus", "--label", "team.example/a_b=", "--label", "release=prometheus")
    status, _, err = run(monkeypatch, capsys, "render", str(tmp_path / "m"), "--scrape", "kubernetes", *words)
    assert (status, err) == (0, "")
    monitor = next(yaml.safe_load_all((tmp_path / "m/monitors.yaml").read_text()))
    labels = monitor["metadata"]["labels"]
    assert {"release": "prometheus", "team.example/a_b": ""}.items() <= labels.items()


def test_a_target_that_is_given_twice_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("render", str(tmp_path / "m"), "--target", "a:8000", "--target", " a:8000", "--target", "[::1]:8000")
    status, out, _ = run(monkeypatch, capsys, *words, "--json")
    assert (status, json.loads(out)["targets"]) == (0, ["a:8000", "[::1]:8000"])


def test_what_is_in_the_way_is_named_and_nothing_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rules").write_text("mine")
    status, _, err = run(monkeypatch, capsys, "render", str(tmp_path), "--target", "a:1")
    assert (status, err.count("\n")) == (2, 1)
    assert f"{tmp_path}/rules is a file, not a directory" in err
    assert [path.name for path in tmp_path.iterdir()] == ["rules"]


@pytest.mark.parametrize(
    ("status", "answer"),
    [(200, b"[]"), (200, b"{}"), (200, b'{"data": {"result": 3, "yaml": [1]}}'), (200, b"<html>"), (404, b"no"),
     (200, b"[" * 100_000)],
)  # fmt: skip
def test_what_answers_and_is_no_prometheus_is_told_so(
    status: int, answer: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(answer)

        do_POST = do_GET  # noqa: N815  # as its base class asks for it

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Other) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        code, _, err = run(monkeypatch, capsys, "plot", "--prometheus", url, "--out", str(tmp_path / "x.svg"), "--json")
        server.shutdown()
    assert (code, err.count("\n")) == (1, 1), err
    assert f"what answers at {url} is no Prometheus (" in err
    assert "start it" not in err


def test_a_prometheus_that_is_not_there_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("plot", "--prometheus", "http://127.0.0.1:1", "--out", str(tmp_path / "x.svg"))
    status, _, err = run(monkeypatch, capsys, *words)
    assert status == 1
    assert "no Prometheus answers at http://127.0.0.1:1" in err


def test_a_directory_without_data_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for program, why in (("", "there is no program 'prometheus'"), ("#!/bin/sh\n", "has no data of a Prometheus")):
        place = tmp_path / f"bin{len(program)}"
        place.mkdir()
        if program:
            (place / "prometheus").write_text(program)
            (place / "prometheus").chmod(0o755)
        monkeypatch.setenv("PATH", str(place))
        status, _, err = run(monkeypatch, capsys, "plot", str(tmp_path), "--out", str(tmp_path / "x.svg"))
        assert (status, why in err) == (2, True), err
