"""Names of `sleeping_rank`, which only a worker of vLLM can import."""

EXTENSION = "harness.sleeping_rank.SleepingRank"
VARIABLE = "KERVAN_TEST_SLEEP"
