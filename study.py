"""A whole study: every model, method, budget and seed, one run after the other.

    python study.py --models=bert,t5 --methods=baseline,stacking,lion --seeds=0,1,2 --budgets=0.05,0.1 --data=english

All other flags are train.py's and go to every run (--size=small, --threads=1, an option of a method that all of them have). What is
finished is kept and what was interrupted is resumed, so the same command goes on after a Ctrl-C, a crash or a reboot, and can
be given more seeds later. On several devices: --launch='torchrun --nproc_per_node=8'. Then: python report.py runs/
"""

import itertools
import shlex
import signal
import subprocess
import sys

import train
from errors import Parser, UserError, exits_on_user_error


@exits_on_user_error
def main(arguments=None):
    parser = Parser(description=__doc__, prog="study.py")
    parser.add_argument("--models", default="bert", help="joined by commas (bert)")
    parser.add_argument("--methods", default="baseline", help="joined by commas (baseline)")
    parser.add_argument("--budgets", default="0.05", help="hours of the reference, joined by commas (0.05)")
    parser.add_argument("--seeds", default="0,1,2", help="joined by commas (0,1,2)")
    parser.add_argument("--launch", default=sys.executable, help="what starts train.py (this Python)")
    options, flags = parser.parse_known_args(arguments)
    plans = []
    for seed, budget, model, method in itertools.product(*(text.split(",") for text in (options.seeds, options.budgets, options.models, options.methods))):
        own = [f"--model={model}", f"--method={method}", f"--budget_hours={budget}", f"--seed={seed}", *flags]
        typed, resumed = train.parse(own)
        if resumed or "out" in typed:
            raise UserError("--resume and --out are single runs' flags; a study finds its runs by their plans")
        plans.append((own, train.resolve(typed)))  # a wrong flag is named before the first run starts
    for number, (own, config) in enumerate(plans, 1):
        folder, state = train.find_run(config)
        print(f"[{number} of {len(plans)}] {train.shown(folder)}: {state}", flush=True)
        if state != "finished":
            this = [f"--resume={train.shown(folder)}"] if state == "interrupted" else [*own, f"--out={train.shown(folder)}"]
            run = subprocess.Popen([*shlex.split(options.launch), train.shown(train.ROOT / "train.py"), *this])
            signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C reaches the run itself, which saves and exits
            signal.signal(signal.SIGTERM, lambda *_: run.terminate())
            if status := run.wait():
                raise SystemExit(status if status > 0 else 128 - status)


if __name__ == "__main__":
    main()
