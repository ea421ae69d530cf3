"""NCCL's report of its ranks, read: samples after NVIDIA's guide."""

from kervan.ranks import ras

RAS_HEAD = """NCCL version 2.30.7 compiled with CUDA 12.8
CUDA runtime version 12080, driver version 13000

Job summary
===========

  Nodes    Processes          GPUs  Processes      GPUs
  (total)   per node   per process    (total)   (total)
      2            4             1          8         8

Communicators... (0.002s)
=============

Group     Comms      Nodes     Ranks     Ranks     Ranks   Status  Errors
    #  in group   per comm  per node  per comm  in group
    0         1          2         4         8         8  RUNNING  {status}

Errors
======

{errors}
Warnings
========

{warnings}
"""
GONE = """INCOMPLETE
  Missing communicator data from 1 job process
  Process 3748990 on node node1 managing GPU 3

#0-0 (1bdb83b038775869) INCOMPLETE
  Missing communicator data from 1 rank
  Rank 7 -- GPU 3 managed by process 3748990 on node node1
"""
LATE = """#0-0 (78db921d1c117b4a) MISMATCH
  Communicator ranks have different AllReduce operation counts
  7 ranks have launched up to operation 64
  Rank 7 has launched up to operation 60 -- GPU 3 managed by process 1650386 on node node1
"""


def test_a_healthy_ras_report_has_no_problem() -> None:
    report = ras.parse(RAS_HEAD.format(status="OK", errors="", warnings=""))
    assert (report.version, report.problems) == ("2.30.7", ())


def test_ras_names_the_rank_that_is_gone_and_the_one_that_is_behind() -> None:
    gone = ras.parse(RAS_HEAD.format(status="INCOMPLETE", errors=GONE, warnings="")).problems
    assert [p.status for p in gone] == ["INCOMPLETE", "INCOMPLETE"]
    assert gone[0].who == ("pid 3748990 on node1, GPU 3",)
    assert gone[1].who == ("rank 7 (pid 3748990 on node1, GPU 3)",)
    (late,) = ras.parse(RAS_HEAD.format(status="MISMATCH", errors="", warnings=LATE)).problems
    assert late.who == ("rank 7 (pid 1650386 on node1, GPU 3)",)
    assert "7 ranks have launched up to operation 64" in late.message


def test_what_is_no_ras_report_is_none() -> None:
    assert ras.parse("HTTP/1.1 400 Bad Request").version == ""
    assert ras.ask({"NCCL_RAS_ADDR": "127.0.0.1:1"}) is None
