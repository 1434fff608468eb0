"""`python -m prism_cuda`."""

from prism_cuda.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
