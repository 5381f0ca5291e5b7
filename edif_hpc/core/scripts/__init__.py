"""Scripts as requests: what travels with one, which models it needs, what it leaves. No torch, and nothing heavy."""
