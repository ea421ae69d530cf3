"""Files that clusters are made from (Kubernetes, Ray's launcher, Slurm, compose, systemd), and what clusters cost."""
