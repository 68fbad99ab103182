"""``python -m twilight_apps.bench``: ``hf-twilight bench`` where no script is installed, as on a lent GPU machine."""

from __future__ import annotations

from .cli_bench import bench

if __name__ == "__main__":
    bench()
