"""Plans as the files that serving engines read, and back."""
