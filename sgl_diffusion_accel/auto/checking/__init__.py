"""Says before any run what each patch can do on a pipeline: `check_pipeline`."""
