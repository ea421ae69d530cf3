"""What kervan's HTML reports have in common."""
