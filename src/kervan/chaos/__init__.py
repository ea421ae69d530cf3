"""`kervan chaos`: disturb a fleet under load, and check every token that clients get meanwhile."""
