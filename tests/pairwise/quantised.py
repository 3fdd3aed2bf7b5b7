"""Weights that other packages keep in fewer bits."""

from __future__ import annotations
