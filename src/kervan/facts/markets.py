"""Market types of nodes. Pools are named by them; Ray's label `ray.io/market-type` says the same."""

ON_DEMAND, SPOT = MARKETS = ("on-demand", "spot")
