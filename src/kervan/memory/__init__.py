"""What training a decoder takes of a GPU's memory, by technique: estimated on paper, measured on the device."""
