"""A whole study: every model, method, budget and seed, one run after the other.

    python study.py --models=bert,t5 --methods=baseline,lion --seeds=0,1 --budgets=0.05,0.1

All other flags are train.py's and go to every run (--size=small, --threads=1, an option of a method
that all of them have). What is finished is kept and what was interrupted is resumed, so the same
command goes on after a Ctrl-C, a crash or a reboot, and can be given more seeds later. A run that
fails is named at the end; the others go on. On several devices: --launch='torchrun
--nproc_per_node=8'. Then: python report.py runs/
"""

import itertools
import shlex
import signal
import subprocess
import sys

import train
from errors import UserError, exits_on_user_error
from flags import Option, Parser
from runs import ROOT, relative_path, status

AXES = {
    "models": ("model", Option("bert", "joined by commas")),
    "methods": ("method", Option("baseline", "joined by commas")),
    "budgets": ("budget_hours", Option("0.05", "hours of the reference, joined by commas")),
    "seeds": ("seed", Option("0,1,2", "joined by commas")),
}


def plans(options, flags):
    """[(flags, `train.Plan`)] of every run. What is wrong with a flag or missing of a corpus is
    named before the first one starts."""
    of_single_runs = {flag: f"--{axis}, joined by commas" for axis, (flag, _) in AXES.items()}
    of_single_runs |= dict.fromkeys(("resume", "out"), "runs that are found by what they are")
    of_single_runs["budget_steps"] = "--budgets, in hours"
    for flag in flags:
        name = flag.removeprefix("--").partition("=")[0]
        if flag.startswith("--") and name in of_single_runs:
            raise UserError(
                f"--{name} is a flag of single runs; a study has {of_single_runs[name]}"
            )
    found = []
    for seed, budget, model, method in itertools.product(
        *(getattr(options, axis).split(",") for axis in ("seeds", "budgets", "models", "methods"))
    ):
        own = [f"--model={model}", f"--method={method}", f"--budget_hours={budget}"]
        own += [f"--seed={seed}", *flags]
        typed, _ = train.parse(own)
        found.append((own, train.plan(train.resolve(typed))))
    return found


class Launcher:
    """Starts one run after the other, and passes on what should stop them."""

    def __init__(self, launch):
        self.command = shlex.split(launch) if launch else [sys.executable]
        self.process, self.stopped = None, 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)

    def stop(self, number, frame):
        """The run saves and exits: Ctrl-C reaches it by itself, a SIGTERM is passed on."""
        self.stopped = number
        if number == signal.SIGTERM and self.process:
            self.process.terminate()

    def run(self, flags):
        """Waits for train.py with these flags; returns its exit status."""
        train_py = relative_path(ROOT / "train.py")
        self.process = subprocess.Popen([*self.command, train_py, *flags])
        if self.stopped:  # while it was starting
            self.process.terminate()
        exit_status, self.process = self.process.wait(), None
        return exit_status


@exits_on_user_error
def main(arguments=None):
    parser = Parser(description=__doc__, prog="study.py")
    for axis, (_, option) in AXES.items():
        parser.add(axis, option)
    parser.add("launch", Option(None, "what starts train.py (this Python)", kind=str))
    options, flags = parser.parse_known_args(arguments)
    todo, failed = plans(options, flags), []
    launcher = Launcher(options.launch)
    for number, (own, planned) in enumerate(todo, 1):
        place = relative_path(planned.folder)
        print(f"[{number} of {len(todo)}] {place}: {status(planned.folder)}", flush=True)
        if status(planned.folder) == "finished":
            continue
        exit_status = launcher.run(own)
        if launcher.stopped:
            raise SystemExit(128 + launcher.stopped)
        if status(planned.folder) != "finished":
            failed.append(f"{place} (exit status {exit_status})")
    if failed:
        print(f"{len(failed)} of {len(todo)} runs failed: {', '.join(failed)}", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()
