"""A full screen that follows a fleet: `kervan top`."""
