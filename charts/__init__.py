"""Charts as SVG, PNG, characters and images in terminals: one palette and orientation, one script for hover."""
