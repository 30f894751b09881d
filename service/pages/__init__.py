"""The dashboard: pages made on the server, readable without scripts. No build step."""
