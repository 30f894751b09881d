"""Models, topologies, routing, plans, and what a plan costs. Imports no other package."""
