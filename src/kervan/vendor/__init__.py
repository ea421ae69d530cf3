"""Names of other people's software that several packages need. Imports none of it, and nothing heavy."""
