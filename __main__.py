"""`python -m moeplace` is the same program as `moeplace`; torchrun takes it as `-m moeplace`."""

from .cli.app import main

if __name__ == "__main__":
    main()
