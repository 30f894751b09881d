"""The API, one file a kind of thing."""
