"""What is true: frozen facts that every other package speaks of."""
