"""Says that the imports after this one take some seconds, if a program of this folder is run and not imported."""

import sys
from pathlib import Path

if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent and not {"-h", "--help"} & set(sys.argv):
    print("loading JAX, Orbax and matplotlib ...", flush=True)
