"""Coding of new tokens."""
