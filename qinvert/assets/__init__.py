"""Trained example models that ship with the package."""
