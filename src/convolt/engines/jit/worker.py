"""A process that compiles kernels for another one, which writes to its standard input and reads a line for each.

First comes a line with the instruction set and the cache's folder, then a kernel a line: ``processes`` says how.
"""

import json
import sys
from pathlib import Path

from convolt.engines.jit.compiler import Compiler
from convolt.engines.jit.isa import Isa
from convolt.engines.jit.processes import decode
from convolt.errors import EngineError


def main() -> None:
    """Compile what standard input names until it ends."""
    greeting = json.loads(sys.stdin.readline())
    compiler = Compiler(Isa(**greeting["isa"]), Path(greeting["folder"]))
    print("ready", flush=True)
    for line in sys.stdin:
        factory, plain = json.loads(line)
        try:
            compiler.kernel(factory, decode(plain))
        except (EngineError, ImportError, AttributeError, ValueError) as error:
            print(f"failed: {error}", flush=True)
        else:
            print("done", flush=True)


if __name__ == "__main__":
    main()
