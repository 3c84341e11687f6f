"""`python -m crossdock_cli`."""

from crossdock_cli.main import main

if __name__ == "__main__":
    main()
