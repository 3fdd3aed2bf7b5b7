"""TeaCache."""
