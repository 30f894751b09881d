"""One self-contained HTML page about a comparison: figures from evaluations, then a renderer."""
