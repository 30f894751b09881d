"""The API, one file a kind of thing."""

from __future__ import annotations

from fastapi import APIRouter

from . import catalogue, deployments, jobs, operations

ROUTERS: tuple[APIRouter, ...] = (
    operations.router,
    catalogue.router,
    catalogue.plans_router,
    deployments.router,
    catalogue.uploads_router,
    jobs.router,
)
