"""Work in ranks: processes of torch, started and watched by one without; rows come back as they are made."""
