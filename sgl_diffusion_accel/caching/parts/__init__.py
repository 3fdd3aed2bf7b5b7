"""What caches are made of: signals, policies, predictors. Pure: tensors and positions, no pipeline, no module."""
