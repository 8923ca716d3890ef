"""``python -m merge_kit``: the same program as ``merge-kit``."""

from merge_kit.cli import main

main()
