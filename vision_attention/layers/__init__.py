"""Linen building blocks without attention."""
