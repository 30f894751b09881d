"""The ground floor: models, topologies, routing, plans, and what a plan costs. Imports no other room."""
