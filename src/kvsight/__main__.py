"""python -m kvsight."""

from kvsight.cli import main

if __name__ == "__main__":
    main()
