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
from flags import Parser
from runs import ROOT, read_record, relative_path

AXES = {"model": "models", "method": "methods", "budget_hours": "budgets", "seed": "seeds"}


def plans(options, flags):
    """[(flags, configuration)] of every run. What is wrong with a flag or missing of a corpus is
    named before the first one starts."""
    for name in (
        flag.removeprefix("--").partition("=")[0] for flag in flags if flag.startswith("--")
    ):
        if name in AXES:
            raise UserError(f"--{name}: a study has --{AXES[name]}, joined by commas")
        if name in ("resume", "out", "budget_steps"):
            raise UserError(
                f"--{name}: a flag of single runs; a study finds its runs by their plans, and "
                "counts hours"
            )
    found, corpora = [], set()
    for seed, budget, model, method in itertools.product(
        *(getattr(options, name).split(",") for name in ("seeds", "budgets", "models", "methods"))
    ):
        own = [
            f"--model={model}",
            f"--method={method}",
            f"--budget_hours={budget}",
            f"--seed={seed}",
            *flags,
        ]
        config = train.resolve(train.parse(own)[0])
        if (corpus := (config.model, config.data, config.vocabulary)) not in corpora:
            train.open_corpus(config)
            corpora.add(corpus)
        try:
            folder, state = train.find_run(config)
        except UserError:  # a damaged folder: named when its turn comes
            state = "damaged"
        if state == "finished" or state == "interrupted" and (folder / "checkpoint.pt").exists():
            check_begun(folder, config)
        found.append((own, config))
    return found


def check_begun(folder, config):
    """Refuses a run that was begun with other settings than the study's where these decide what an
    hour buys: a precision, and where an hour is plain time (--reference=this) the device and its
    threads."""
    begun_with = read_record(folder / "config.json")
    plain_time = {"device", "threads"} if config.reference == "this" else set()
    for name in sorted(train.DECIDES_WHAT_AN_HOUR_BUYS | plain_time):
        theirs, ours = begun_with.get(name), getattr(config, name)
        if str(theirs).partition(":")[0] != str(ours).partition(":")[0]:  # cuda:0 is a cuda
            raise UserError(
                f"{relative_path(folder)} was begun with --{name}={theirs}, not {ours}; move it "
                "away to run it again, or keep to its flags"
            )


@exits_on_user_error
def main(arguments=None):
    parser = Parser(description=__doc__, prog="study.py")
    parser.add_argument("--models", default="bert", help="joined by commas (bert)")
    parser.add_argument("--methods", default="baseline", help="joined by commas (baseline)")
    parser.add_argument(
        "--budgets", default="0.05", help="hours of the reference, joined by commas (0.05)"
    )
    parser.add_argument("--seeds", default="0,1,2", help="joined by commas (0,1,2)")
    parser.add_argument("--launch", help="what starts train.py (this Python)")
    options, flags = parser.parse_known_args(arguments)
    launch, run, stopped, failed = (
        shlex.split(options.launch) if options.launch else [sys.executable],
        None,
        [],
        [],
    )

    def stop(number, frame):
        """The run saves and exits: Ctrl-C reaches it by itself, a SIGTERM is passed on."""
        stopped.append(number)
        if number == signal.SIGTERM and run:
            run.terminate()

    todo = plans(options, flags)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    for number, (own, config) in enumerate(todo, 1):
        try:
            folder, state = train.find_run(config)
        except UserError as error:  # a damaged folder in its place
            failed.append(f"{train.plan_name(config)} ({error})")
            continue
        print(f"[{number} of {len(todo)}] {relative_path(folder)}: {state}", flush=True)
        if state != "finished" and not stopped:
            place = "resume" if state == "interrupted" else "out"
            run = subprocess.Popen(
                [
                    *launch,
                    relative_path(ROOT / "train.py"),
                    *own,
                    f"--{place}={relative_path(folder)}",
                ]
            )
            if stopped:  # while it was starting
                run.terminate()
            status, run = run.wait(), None
            if status and not stopped:
                failed.append(f"{relative_path(folder)} (exit status {status})")
        if stopped:
            break
    if failed:
        print(f"{len(failed)} of {len(todo)} runs failed: {', '.join(failed)}", file=sys.stderr)
    if stopped or failed:
        raise SystemExit(128 + stopped[0] if stopped else 2)


if __name__ == "__main__":
    main()
