"""The compute node: agent, model host, executor. The only server room that imports torch and nnsight."""
