"""How many replicas a fleet should have, of which pool, and which of them leaves: pure decisions, once a second."""
