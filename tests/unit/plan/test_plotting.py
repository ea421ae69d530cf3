"""The plot: one file that needs nothing else, with a line for each layout."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from harness.places import MODELS

from kervan.config.workload import Slo, parse_lengths
from kervan.errors import ConfigError
from kervan.facts import hardware
from kervan.facts.architecture import parse
from kervan.plan import plotting
from kervan.plan.curves import SHARES, curve
from kervan.plan.explain import LayoutPlan
from kervan.plan.request import PlanRequest
from kervan.plan.search import search


@pytest.fixture(scope="module")
def plan() -> LayoutPlan:
    spec = parse(json.loads((MODELS / "llama3-8b" / "config.json").read_text()), "llama3-8b/config.json")
    isl, osl, slo = parse_lengths("512"), parse_lengths("64"), Slo(ttft_s=2.0, tpot_s=0.05)
    return search(PlanRequest(spec=spec, gpu=hardware.gpu("H200"), gpus=2, slo=slo, isl=isl, osl=osl))


def test_a_layout_is_drawn_through_all_its_loads(plan: LayoutPlan) -> None:
    points = curve(plan.request, plan.best)
    assert len(points) == len(SHARES)
    rates = [point.requests_s for point in points]
    assert rates == pytest.approx([share * plan.best.requests_s for share in SHARES])
    assert points[0].tpot_p50_ms < points[-1].tpot_p50_ms
    assert points[-1].tok_s_per_gpu == pytest.approx(plan.best.out_tok_s / 2)


def test_the_page_is_whole(plan: LayoutPlan, tmp_path: Path) -> None:
    path = tmp_path / "plot.html"
    plotting.write(plan, path)
    text = path.read_text()
    assert len(text) < 100_000
    svg = ET.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])
    words = [element.text for element in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert words[0] == "llama3-8b on 2 x H200"
    assert {"2 x TP1", "TP2", "PP2", "SLO ttft=2s,tpot=50ms"} <= set(words)
    lines = list(svg.iter("{http://www.w3.org/2000/svg}polyline"))
    assert len(lines) == 1 + sum(c.fits for c in plan.layouts)
    with pytest.raises(ConfigError, match="cannot be written"):
        plotting.write(plan, tmp_path)


def test_no_layout_of_the_front_is_beaten_in_both(plan: LayoutPlan) -> None:
    front = plotting.pareto([c for c in plan.layouts if c.fits])
    for one in front:
        assert not any(
            c.tpot_p50_ms < one.tpot_p50_ms and c.out_tok_s / c.layout.gpus > one.out_tok_s / one.layout.gpus
            for c in plan.layouts
            if c.fits
        )
