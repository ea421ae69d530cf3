"""All contact with vLLM internals. `versions` holds what differs between releases; a contract test covers each."""
