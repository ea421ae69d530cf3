"""The engine-core seam: one client that speaks to all replicas, and the journal of every stream."""
