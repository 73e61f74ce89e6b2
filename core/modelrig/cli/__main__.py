import sys

from modelrig.cli import main

sys.exit(main())
