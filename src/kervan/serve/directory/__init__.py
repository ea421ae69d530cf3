"""The fleet directory on Ray: the actor, and the client through which everybody asks it."""
