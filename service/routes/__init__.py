"""The API, one file a kind of thing."""

from __future__ import annotations

from fastapi import APIRouter

from . import catalogue, deployments, engines, jobs, operations, plans, studies, uploads

ROUTERS: tuple[APIRouter, ...] = (
    operations.router,
    catalogue.router,
    plans.router,
    deployments.router,
    engines.router,
    uploads.router,
    jobs.router,
    studies.router,
)
