"""Work in ranks of torch's elastic launcher (what `torchrun` runs), started and read by a process without torch."""
