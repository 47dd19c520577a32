"""`python -m wherefrom.cli`, for `torchrun -m` and where scripts are not on the path."""

from wherefrom.cli.entry import main

if __name__ == "__main__":
    main()
