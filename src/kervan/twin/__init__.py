"""Simulated engine replicas that speak the replica protocol in real time."""
