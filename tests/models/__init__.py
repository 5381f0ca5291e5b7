"""The models that tests run on: tiny ones with real architectures, and the real SmolLM2."""
