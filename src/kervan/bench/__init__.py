"""The load tester: `kervan.bench.benchmark` measures a server, the rest is what it is made of."""
