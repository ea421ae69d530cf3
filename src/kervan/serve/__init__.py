"""Ray Serve: starts, places, watches, scales and ends the gateways and engine replicas of a fleet."""
