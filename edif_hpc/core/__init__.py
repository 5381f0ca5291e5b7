"""What every machine shares: wire schema, errors, settings, the Redis queue, the object store. No torch, no nnsight."""
