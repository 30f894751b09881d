"""Permutation of checkpoints, models and their optimizer state by a plan without replicas."""
