"""Streams whose clients come back: journals of what was sent, and their copies at another gateway."""
