"""`python -m moeplace.cli` is the same program as `moeplace`."""

from .app import main

if __name__ == "__main__":
    main()
