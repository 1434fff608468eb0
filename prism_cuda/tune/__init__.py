"""``python -m prism_cuda tune``: what settings cost a model, and budgets for its heads."""
