"""Reals to codes and back."""
