"""mmMamba on servers: the vLLM plugin, and what `mmmamba serve` adds to a server."""
