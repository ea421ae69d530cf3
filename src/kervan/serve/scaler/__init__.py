"""How many replicas a fleet has: observed and decided beside the directory, carried out by Serve's controller."""
