"""``python -m infini_bench`` is ``infini-bench``."""

from infini_bench.cli.main import main

if __name__ == "__main__":
    main()
