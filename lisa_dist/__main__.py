"""`python -m lisa_dist`: the `lisa-dist` command."""

from lisa_dist.cli import main

if __name__ == "__main__":
    main()
