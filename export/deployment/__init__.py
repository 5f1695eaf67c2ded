"""Whole models as two static graphs, prefill and decode, that hand all states on."""
