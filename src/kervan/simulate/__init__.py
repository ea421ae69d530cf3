"""A whole fleet on a virtual clock: load, replicas, gateways, markets, and the very same policies as the live one."""
