"""Tasks: what a plan costs in things that a model is asked to do, each against the uncompressed model."""
