"""``python -m moesaic``: the command line, also where no script was installed."""

from moesaic.nas.cli import main

main()
