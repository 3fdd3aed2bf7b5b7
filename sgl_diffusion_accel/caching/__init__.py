"""Caches: one machine of exchangeable parts, and its front doors."""
