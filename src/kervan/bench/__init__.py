"""The load tester: `kervan.bench.run` measures a server, the rest is what it is made of."""
