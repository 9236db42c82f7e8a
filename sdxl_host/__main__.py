"""`python -m sdxl_host`."""

from sdxl_host.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
