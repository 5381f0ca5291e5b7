"""Hostile blocks through the stock client, at every level, and an honest request after each."""
