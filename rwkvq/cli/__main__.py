"""`python -m rwkvq.cli`."""

from rwkvq.cli import main

main()
