"""Stand-ins for what other libraries offer, under their own signatures, so that one import switches."""
