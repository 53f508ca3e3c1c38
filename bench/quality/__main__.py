"""python -m bench.quality VARIANT…"""

from .study import main

main()
