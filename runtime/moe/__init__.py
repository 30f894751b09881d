"""A distributed mixture-of-experts layer that lives by a plan: dispatch, experts, combine, migration, checkpoints."""
