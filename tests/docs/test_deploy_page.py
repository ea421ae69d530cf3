"""docs/deploy.md: the costs are what the command prints, and the times what is rendered."""

import re
import shlex
import subprocess
import sys

from harness import clusters
from harness.places import DOCS, REPOSITORY

from kervan.cluster.clouds import CLOUDS

PAGE = (DOCS / "deploy.md").read_text()


def test_the_costs_shown_are_what_the_command_prints() -> None:
    ((command, shown),) = re.findall(r"^<!-- cost -->\n```text\n\$ (kervan [^\n]*)\n(.*?)^```", PAGE, re.M | re.S)
    words = [sys.executable, "-m", "kervan", *shlex.split(command)[1:]]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=True)
    assert [line.rstrip() for line in done.stdout.splitlines()] == shown.splitlines()


def test_the_times_of_spot_nodes_are_those_that_are_rendered() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| ?(\d*) \| (\d+)(?: \(at most (\d+)\))? \| (\d+)(?: \(at most (\d+)\))? \| `(\S+?)[=`]",
        PAGE,
        re.M,
    )
    assert {row[0] for row in rows} == set(CLOUDS)
    for name, notice, drain, most_drain, period, most_period, label in rows:
        request = clusters.request("kuberay", cloud_name=name)
        cloud = request.cloud
        assert not notice or float(notice) == cloud.notice_s
        assert cloud.spot_label[0] == label
        grace = request.grace("spot")
        assert (int(drain), int(period)) == (grace.drain_s, grace.period_s)
        longest = clusters.changed_fleet(request, drain_timeout_s=10_000.0).grace("spot")
        assert (int(most_drain or drain), int(most_period or period)) == (longest.drain_s, longest.period_s)
