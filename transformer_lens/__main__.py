"""`python -m transformer_lens`: the command line. Needs the extra `[cli]`."""

from transformer_lens.cli import main

if __name__ == "__main__":
    main()
