"""One process of a run, which DeepSpeed's launcher starts:

    python -m training.launch.process --local_rank=0 step1_sft.main CONFIG.json [...]

A stage imports some hundred thousand objects, none of which is garbage. Without the garbage
collector this takes four fifths of the time; it is switched on again before the stage begins.
"""

import gc
import runpy
import sys

if __name__ == "__main__":
    gc.disable()
    place = next(index for index, word in enumerate(sys.argv[1:], 1) if not word.startswith("--"))
    runpy.run_module(sys.argv.pop(place), run_name="__main__", alter_sys=True)
