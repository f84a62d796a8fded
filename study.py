"""A whole study: every model, method, learning rate, budget and seed.

    python study.py --models=bert,t5 --methods=baseline,lion --seeds=0,1 --budgets=0.05,0.1
    python study.py --methods=lion --lrs=1e-4,3e-4,1e-3 --seeds=0 --budgets=0.05    to tune a method

All other flags are train.py's and go to every run (--size=small, --threads=1, an option that all
the methods have; one that only some have needs a command of its own). What is finished is kept and
what was interrupted is resumed, so the same command goes on after a Ctrl-C, a crash or a reboot,
and can be given more seeds later. A run that fails is named at the end; the others go on.

    --launch='torchrun --nproc_per_node=8'    every run on several devices
    --at_once=2 --threads=1                   several runs at once on a CPU
    python report.py runs/                    afterwards: tables and figures
"""

import itertools
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from config import parse, plan, resolve
from errors import UserError, exits_on_user_error
from flags import Option, Parser
from runs import ROOT, relative_path, status

AXES = {  # the last one varies fastest
    "seeds": ("seed", Option("0,1,2", "seeds, joined by commas")),
    "budgets": ("budget_hours", Option("", "hours of the reference, joined by commas (0.05)")),
    "models": ("model", Option("bert", "models, joined by commas")),
    "methods": ("method", Option("baseline", "methods, joined by commas")),
    "lrs": ("lr", Option("", "learning rates, joined by commas (each method's own)")),
}


def plans(options, flags):
    """[(flags, `config.Plan`)] of every run. What is wrong with a flag or missing of a corpus is
    named before the first one starts."""
    of_single_runs = {flag: f"--{axis}, joined by commas" for axis, (flag, _) in AXES.items()}
    of_single_runs |= dict.fromkeys(("resume", "out"), "folders named after their settings")
    for flag in flags:
        name = flag.removeprefix("--").partition("=")[0]
        if flag.startswith("--") and name in of_single_runs:
            raise UserError(
                f"--{name} is a flag of single runs; a study has {of_single_runs[name]}"
            )
    found = {}
    lists = {axis: getattr(options, axis).split(",") for axis in AXES}
    for axis, values in lists.items():
        if len(values) > 1 and "" in values:
            raise UserError(
                f"--{axis}={getattr(options, axis)}: nothing stands at one of its commas"
            )
    for values in itertools.product(*lists.values()):
        pairs = zip((flag for flag, _ in AXES.values()), values)
        own = [f"--{flag}={value}" for flag, value in pairs if value] + flags
        typed, _ = parse(own)
        planned = plan(resolve(typed))
        found[planned.folder] = own, planned  # what is listed twice is one run
    return list(found.values())


class Launcher:
    """Starts runs, and passes on what should stop them."""

    def __init__(self, launch):
        self.command = shlex.split(launch) if launch else [sys.executable]
        self.running, self.stopped = set(), 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)

    def stop(self, number, frame):
        """The run saves and exits: Ctrl-C reaches it by itself, a SIGTERM is passed on."""
        self.stopped = number
        if number == signal.SIGTERM:
            for process in list(self.running):
                process.terminate()

    def run(self, flags):
        """Waits for train.py with these flags; returns its exit status."""
        process = subprocess.Popen([*self.command, relative_path(ROOT / "train.py"), *flags])
        self.running.add(process)
        if self.stopped:  # while it was starting
            process.terminate()
        exit_status = process.wait()
        self.running.remove(process)
        return exit_status


@exits_on_user_error
def main(arguments=None):
    parser = Parser(description=__doc__, prog="study.py")
    for axis, (_, option) in AXES.items():
        parser.add(axis, option)
    parser.add("launch", Option(None, "what starts train.py (this Python)", kind=str))
    parser.add("at_once", Option(1, "how many runs side by side", minimum=1))
    options, flags = parser.parse_known_args(arguments)
    todo, failed = plans(options, flags), []
    launcher = Launcher(options.launch)

    def run(number, own, planned):
        if launcher.stopped:
            return
        place = relative_path(planned.folder)
        state = f"{status(planned.folder)}{planned.note}"
        print(f"[{number} of {len(todo)}] {place}: {state}", flush=True)
        if status(planned.folder) == "finished":
            return
        exit_status = launcher.run(own)
        if status(planned.folder) != "finished":
            failed.append(f"{place} (exit status {exit_status})")

    with ThreadPoolExecutor(options.at_once) as pool:
        for started in [pool.submit(run, n, *one) for n, one in enumerate(todo, 1)]:
            started.result()
    if launcher.stopped:
        raise SystemExit(128 + launcher.stopped)
    if failed:
        print(f"{len(failed)} of {len(todo)} runs failed: {', '.join(failed)}", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()
