"""What is there: the machine that kervan runs on, as its driver describes it."""
