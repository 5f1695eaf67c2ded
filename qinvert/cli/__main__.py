"""``python -m qinvert.cli``."""

from __future__ import annotations

from qinvert.cli import main

main()
