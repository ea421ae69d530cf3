"""The engine-core seam: one client that speaks to all replicas, and keeps what moves each stream."""
