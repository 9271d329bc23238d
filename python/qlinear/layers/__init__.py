"""The layers, one module a family of formats."""
