"""What a user asks for: a fleet, its engines' arguments, a load and its SLO."""
