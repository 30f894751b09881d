"""The service: plans of deployments kept right while traffic drifts. HTTP API, jobs, drift, dashboard.

Needs the extra `service` (FastAPI, uvicorn), `client` excepted.
"""
