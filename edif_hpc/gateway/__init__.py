"""The HTTP and WebSocket front on the login node. No torch, no nnsight, no unpickling."""
