"""`python -m retrofit`, which a launcher of several ranks takes as `-m retrofit`."""

from retrofit.cli import main

main()
