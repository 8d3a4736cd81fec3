"""Measure what a plan costs."""
