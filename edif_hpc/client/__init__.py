"""The user's machine: connect, submit, follow, download."""
