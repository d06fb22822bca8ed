"""`python -m streamlearn`, the same as `streamlearn`."""

from streamlearn.cli import main

if __name__ == "__main__":
    main()
