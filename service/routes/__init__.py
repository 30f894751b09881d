"""The API, one file a kind of thing."""

from __future__ import annotations

from fastapi import APIRouter

from . import catalogue, deployments, jobs, operations, plans, uploads

ROUTERS: tuple[APIRouter, ...] = (
    operations.router,
    catalogue.router,
    plans.router,
    deployments.router,
    uploads.router,
    jobs.router,
)
