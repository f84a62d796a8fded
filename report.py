"""Finished runs to tables and figures. Changes nothing in a run's folder.

    python report.py runs/                     every run below a folder, as Markdown
    python report.py RUN RUN ... --csv=FILE    the same table as CSV
    python report.py runs/ --figures=FOLDER    and figures (pip install matplotlib)

A table has the runs that may be compared: of one model and size, on the same rows and tokens, under
one budget of one reference. In it a row is a method with one set of hyper-parameters, and its runs
are seeds. A difference from the baseline is the mean over the pairs of runs of the same seed; with
fewer than two of them, where both have two seeds or more, it is that of the means (Welch). Its
change is from a method's shortest budget to its longest, over the same seeds. A 95% interval is
Student's, for so few runs. (Below zero is better; the ± of a loss is the standard deviation over
its seeds, that of a difference half its interval.) A speed-up is the budget at which the baseline
ends as low, over this one; it needs runs of the baseline of two budgets. Of a method's settings
those with the most runs have its bare name. Charged hours and stalled seconds are the reference's;
free and wall hours are the runs' machines'. What is missing is shown as missing; what is unfinished
or damaged is named.
"""

import collections
import contextlib
import csv
import functools
import io
import itertools
import json
import math
import re
import statistics
import typing
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import tasks
from errors import UserError, exits_on_user_error
from flags import Option, Parser
from runs import CONFIG, NOT_IN_ID, check_record, read_log, read_record, status, written_whole

MISSING = "–"
# Settings that the runs of a table agree in, beside the budget, the corpus and the reference.
COMPARED = "model size vocabulary row_length mask_share validation_rows holdout train_on".split()
BUDGET = ("budget_hours", "budget_steps")
# What does not tell a table's rows apart: what all its runs agree in, and what the runs of one row
# may differ in.
NOT_A_SETTING = {*NOT_IN_ID, *COMPARED, *BUDGET, "seed", "validations", "options"}
COMPARED_TYPES = dict.fromkeys(COMPARED, (str, int, float)) | {
    "budget_hours": (float, None),
    "budget_steps": (int, None),
    "data": str,
    "reference": str,
    "seed": int,
    "method": str,
    "options": dict,
}
NUMBERS = ("validation_loss", "updates", "rows", "charged_seconds", "free_seconds", "wall_seconds")
RESULT = dict.fromkeys(NUMBERS, float) | {"config": dict}


class Score(typing.NamedTuple):
    """What is measured after fine-tuning, and how: only scores of one kind may be compared, and
    averaged."""

    suite: str
    task: str
    metric: str
    untrained: bool
    recipe: str  # JSON
    data: str  # JSON; what tells the task's data from others


@dataclass
class Run:
    """A folder that `train.py` made."""

    folder: Path
    stored: dict  # config.json; {} if it cannot be read
    result: dict  # {} if the run is unfinished
    validations: list  # [charged hours or updates, validation loss], in order
    scores: dict  # {Score: {"last": {seed of the fine-tuning: score}, "best": ...}}
    problems: list  # why it is in no mean, and what is damaged; empty for a finished, whole run

    @property
    def config(self):
        return self.stored["config"]

    @property
    def settings(self):
        """All that a person can set and that decides the result, but for what tables are made by:
        {flag: value}."""
        flags = self.config | self.config["options"]
        return {name: flags[name] for name in flags if name not in NOT_A_SETTING}

    @property
    def family(self):
        """What runs must agree in to be compared, but for the budget: {name: value}. Where hours
        are plain time (--reference=this) they are those of one device, with so many threads and
        processes; updates are the same everywhere."""
        reference = self.stored["reference"]
        family = {name: self.config[name] for name in COMPARED} | {"corpus": self.stored["corpus"]}
        if self.config["budget_steps"]:
            return family
        family["reference"] = Path(self.config["reference"]).stem
        if reference["probe_seconds"]:
            return family | {"probe_seconds": reference["probe_seconds"]}
        processes = self.result.get("processes", 1)
        return family | {"hour": f"{reference['provenance']}, {processes} process(es)"}

    @property
    def budget(self):
        return tuple(self.config[name] for name in BUDGET)


def read_scores(folder):
    """(what finetune.py left in a run's folder, as `Run.scores`; what is wrong with it)."""
    results, problems, scores = [], [], {}
    for path in sorted((folder / "finetuned").rglob("*-seed*.json")):
        try:
            results.append(tasks.read_result(path))
        except UserError as error:
            problems.append(str(error))
    weights = {result["weights"] for result in results}
    if len(weights) > 1:
        problems.append(
            f"{folder / 'finetuned'}: its results are of {len(weights)} different weights, so none "
            "of them is shown"
        )
        return {}, problems
    kinds = grouped(results, lambda one: (one["suite"], one["untrained"], as_key(one["recipe"])))
    for (suite, untrained, recipe), alike in kinds.items():
        module = tasks.find(suite)
        by_data = grouped(alike, lambda one: (one["task"], as_key(one["data"])))
        for (_, data), own in by_data.items():
            for (task, metric), found in tasks.summary(own, module).items():
                scores[Score(suite, task, metric, untrained, recipe, data)] = found
        averaged = sorted(key for key in by_data if key[0] in dict(module.AVERAGED))
        # With two kinds of data of one task there is no mean of the suite.
        if len(averaged) == len(dict(averaged)):
            data = as_key({"data_checksum": zlib.crc32(repr(averaged).encode())})
            if mean := tasks.summary(alike, module).get(("all", "score")):
                scores[Score(suite, "all", "score", untrained, recipe, data)] = mean
    return scores, problems


def grouped(items, key):
    """{key(item): the items that have it}"""
    groups = collections.defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups


def as_key(record):
    return json.dumps(record, sort_keys=True)


def read(folder):
    """A run folder, whatever its state: a `Run`."""
    scores, problems = read_scores(folder)
    try:
        kinds = {"config": COMPARED_TYPES, "reference": {"probe_seconds": dict, "provenance": str}}
        stored = read_record(folder / "config.json", CONFIG | kinds)
    except UserError as error:
        return Run(folder, {}, {}, [], scores, [str(error), *problems])
    config, result = stored["config"], {}
    if status(folder) == "finished":
        try:
            result = read_record(folder / "result.json", RESULT)
        except UserError as error:
            problems = [str(error), *problems]
    else:
        problems.append("unfinished")
    ended_with = result.get("config", config)
    fixed = ended_with.keys() - NOT_A_SETTING
    if not stored["reference"]["probe_seconds"] and config["budget_hours"]:
        fixed |= {"threads", "device"} & ended_with.keys()  # what an hour buys
    for name in sorted(fixed):
        if ended_with[name] != config.get(name):
            problems.append(
                f"resumed with another {name}, {config.get(name)} and then {ended_with[name]}; it "
                "stands where it began"
            )
    then, now = stored.get("method_files", {}), result.get("method_files", {})
    for name in sorted(then.keys() & now.keys()):
        if then[name] != now[name]:
            problems.append(f"methods/{name}.py was edited between its beginning and its end")
    validations, damage = read_validations(folder, config)
    return Run(folder, stored, result, validations, scores, problems + [damage] * bool(damage))


def read_validations(folder, config):
    """([budget spent, validation loss] of a run's log as far as it can be read, the budget in
    hours, or in updates; what is wrong with the rest)."""
    points, kinds = [], {"validation_loss": float, "update": int, "spent_seconds": float}
    path = folder / "log.jsonl"
    try:
        for record in read_log(folder):
            if "validation_loss" in record:
                check_record(record, kinds, path)
                hours = record["spent_seconds"] / 3600
                spent = record["update"] if config["budget_steps"] else hours
                points.append([float(spent), float(record["validation_loss"])])
    except UserError as error:
        return points, f"{error}; the curve ends there"
    return points, ""


def find_runs(paths):
    """The runs at these paths or below them."""
    folders = []
    for path in map(Path, paths):
        found = (
            [path]
            if (path / "config.json").exists()
            else sorted(file.parent for file in path.rglob("config.json"))
        )
        if not found:
            raise UserError(f"{path}: neither the folder of a run nor a folder with runs in it")
        folders += [folder for folder in found if folder not in folders]
    return [read(folder) for folder in folders]


# -- Statistics ------------------------------------------------------------------------------------


@functools.cache
def student_t(degrees, confidence=0.95):
    """Student's t for a two-sided interval. With t = sqrt(degrees) tan(angle) the density is
    that of cos(angle)^(degrees - 1), which is summed up here: within 1e-6."""
    angles = np.linspace(0, np.pi / 2, 200_001)
    density = np.cos(angles) ** (degrees - 1)
    mass = np.cumsum(density[1:] + density[:-1])
    return degrees**0.5 * math.tan(np.interp(confidence * mass[-1], mass, angles[1:]))


def deviation(values):
    """The standard deviation of a sample; None of fewer than two."""
    values = list(values)
    return statistics.stdev(values) if len(values) > 1 else None


def averaged(pairs):
    """{key: the mean of its values}"""
    groups = grouped(pairs, lambda pair: pair[0])
    return {key: statistics.mean(value for _, value in own) for key, own in groups.items()}


def difference(ours, baseline, confidence=0.95):
    """(mean, half the width of its interval or None, how) of the difference between two
    experiments, {seed: loss}."""
    common = sorted(set(ours) & set(baseline))
    fewest = min(len(ours), len(baseline))
    if len(common) >= 2 or (common and fewest < 2):
        differences = [ours[seed] - baseline[seed] for seed in common]
        half = None
        if len(common) > 1:
            half = student_t(len(common) - 1, confidence)
            half *= deviation(differences) / len(common) ** 0.5
        return statistics.mean(differences), half, f"paired, {len(common)}"
    samples = list(ours.values()), list(baseline.values())
    mean = statistics.mean(samples[0]) - statistics.mean(samples[1])
    if fewest < 2:
        return mean, None, "unpaired"
    # Welch 1947: unequal variances.
    parts = [statistics.variance(sample) / len(sample) for sample in samples]
    weights = [part**2 / (len(sample) - 1) for part, sample in zip(parts, samples)]
    degrees = sum(parts) ** 2 / sum(weights) if sum(parts) else 1
    return mean, student_t(degrees, confidence) * sum(parts) ** 0.5, "unpaired"


# -- Rows and tables -------------------------------------------------------------------------------


@dataclass
class Row:
    """One experiment: a method with its settings, in one table."""

    label: str  # the method, and the settings that tell it from its other rows
    settings: dict
    started: list  # its runs, finished or not

    @property
    def runs(self):
        """Those that are finished."""
        return [run for run in self.started if run.result]

    def losses(self):
        """{seed: final validation loss}; of a seed that ran twice the mean."""
        return averaged((run.config["seed"], run.result["validation_loss"]) for run in self.runs)

    def mean_loss(self):
        """The mean over seeds; None without a run."""
        return statistics.mean(self.losses().values()) if self.runs else None

    def scores(self, score, kind):
        """(unit, {seed: mean score}) of the "last" or "best" epochs. The unit is "pre-training"
        if several of its seeds have the score and it is not of untrained weights (then a value is
        the mean of a seed's fine-tunings), else "fine-tuning"."""
        found = [
            (run.config["seed"], run.scores[score][kind])
            for run in self.runs
            if score in run.scores
        ]
        if score.untrained or len({seed for seed, _ in found}) < 2:
            return "fine-tuning", averaged(pair for _, own in found for pair in own.items())
        means = ((seed, statistics.mean(own.values())) for seed, own in found)
        return "pre-training", averaged(means)


@dataclass
class Table:
    """Runs of one family under one budget, a row an experiment: the baseline first, then by mean
    loss."""

    family: str  # for people: tables of one family differ in their budgets only
    budget: tuple  # (hours, None) or (None, updates)
    reference: str
    rows: list

    @property
    def budget_title(self):
        hours, updates = self.budget
        return f"{updates} updates" if updates else f"{hours:g} h of {self.reference}"

    @property
    def title(self):
        return f"{self.family}, {self.budget_title}"

    @property
    def baseline(self):
        """The row that the others are compared with: the one called so, or else the baseline's with
        the most runs here."""
        rows = [row for row in self.rows if row.settings["method"] == "baseline" and row.runs]
        return max(rows, key=lambda row: (row.label == "baseline", len(row.runs)), default=None)


def labels_of(runs):
    """{settings as JSON: label} of a family's experiments. Of a method's experiments the one
    with the most finished runs, over all budgets, has the bare name (of several the one with the
    lowest mean loss at the budgets that they share). The others add the settings in which they
    differ from it."""
    labels = {}
    for method, of_method in grouped(runs, lambda run: run.config["method"]).items():
        experiments = grouped(of_method, lambda run: as_key(run.settings))
        finished = {text: [run for run in own if run.result] for text, own in experiments.items()}
        most = max(map(len, finished.values()))
        first = {text: own for text, own in finished.items() if len(own) == most}
        budgets = set.intersection(*({run.budget for run in own} for own in first.values()))
        rank = {
            text: (averaged_loss(run for run in own if run.budget in budgets), text)
            for text, own in first.items()
        }
        plain = json.loads(min(rank, key=rank.get))
        for text in experiments:
            own = json.loads(text)
            names = sorted(own.keys() | plain.keys())
            telling = [name for name in names if own.get(name) != plain.get(name)]
            labels[text] = " ".join([method, *(f"{name}={own.get(name)}" for name in telling)])
    return labels


def averaged_loss(runs):
    """Infinite without a run."""
    losses = [run.result["validation_loss"] for run in runs]
    return statistics.mean(losses) if losses else math.inf


def tables_of(runs):
    """The `Table`s of all runs whose configuration can be read."""
    families = grouped([run for run in runs if run.stored], lambda run: as_key(run.family))
    tables, used = [], collections.Counter()
    for members in families.values():
        name = family_name(members[0], [other[0] for other in families.values()])
        used[name] += 1
        if used[name] > 1:  # references that differ in a digit that is not shown
            name += f" ({used[name]})"
        labels = labels_of(members)
        for budget, of_budget in grouped(members, lambda run: run.budget).items():
            rows = [
                Row(labels[text], json.loads(text), own)
                for text, own in grouped(of_budget, lambda run: as_key(run.settings)).items()
            ]
            rows.sort(key=lambda row: (row.mean_loss() or math.inf, row.label))
            rows.sort(key=lambda row: row.label != "baseline")
            tables.append(Table(name, budget, members[0].family.get("reference"), rows))
    return sorted(
        tables, key=lambda table: (table.family, table.budget[1] or 0, table.budget[0] or 0)
    )


def family_name(run, others):
    """What a table is of, and what tells it from the others of this model and corpus's name."""

    def subject(run):
        return f"{run.config['model']}-{run.config['size']} on {Path(run.config['data']).name}"

    alike = [other.family for other in others if subject(other) == subject(run)]
    own = run.family
    telling = [name for name in own if any(other.get(name) != own[name] for other in alike)]
    if own["train_on"] == "training":  # as nearly all are
        telling = [name for name in telling if name != "train_on"]
    return ", ".join([subject(run), *(f"{name} {short(own[name])}" for name in telling)])


def short(value):
    """A value of a family for a title; a checksum's first digits."""
    if isinstance(value, dict):
        return " ".join(f"{name} {seconds:.4g}" for name, seconds in value.items()) or MISSING
    return str(value)[:8] if re.fullmatch(r"[0-9a-f]{32,}", str(value)) else value


def differing_files(table):
    """{method: {hash of its file: folders}} of the method files of which a table's runs had several
    versions."""
    found = collections.defaultdict(lambda: collections.defaultdict(list))
    for run in (run for row in table.rows for run in row.runs):
        for name, version in run.result.get("method_files", {}).items():
            found[name][version].append(run.folder)
    return {name: versions for name, versions in found.items() if len(versions) > 1}


def noise_floor(table):
    """(number of rows; standard deviation of a run's loss; its degrees of freedom; the least
    difference between two rows' means that it does not explain, at 95%: Fisher's least significant
    difference); None without a baseline, or with fewer than two rows or seeds. Of the rows with all
    of the baseline's seeds: what the means of row and seed leave of a loss, taken to vary alike in
    all rows."""
    if not table.baseline:
        return None
    seeds = sorted(table.baseline.losses())
    losses = [row.losses() for row in table.rows]
    losses = np.array([[own[seed] for seed in seeds] for own in losses if own.keys() >= {*seeds}])
    degrees = (len(losses) - 1) * (len(seeds) - 1)
    if degrees < 1:
        return None
    means = losses.mean(0) + losses.mean(1, keepdims=True) - losses.mean()
    one_run = (np.square(losses - means).sum() / degrees) ** 0.5
    return len(losses), one_run, degrees, student_t(degrees) * one_run * (2 / len(seeds)) ** 0.5


def seeds_apart(row, baseline):
    """The seeds of which a row's run and the baseline's had different devices. Reference time
    makes their hours alike, not equal."""

    def devices(row):
        known = [run for run in row.runs if run.result.get("device")]
        by_seed = grouped(known, lambda run: run.config["seed"])
        return {seed: {run.result["device"] for run in own} for seed, own in by_seed.items()}

    ours, theirs = devices(row), devices(baseline)
    return sorted(seed for seed in ours.keys() & theirs.keys() if ours[seed] != theirs[seed])


# -- Tables ----------------------------------------------------------------------------------------

COLUMNS = """group model size data train_on reference budget_hours budget_steps method n
    validation_loss standard_deviation difference interval_95 how speed_up speed_up_low
    speed_up_high updates rows charged_hours free_hours wall_hours stall_seconds settings""".split()


def record_of(row, table, points, titles):
    """A row of a table as {column: value}, None where it is missing. `points`: the baseline's
    (budget hours, final loss) at all budgets of the family; `titles`: of the fine-tuning's
    scores."""
    losses = row.losses()
    record = dict.fromkeys(COLUMNS) | {
        "family": table.family,
        "group": table.title,
        "reference": table.reference,
        "method": row.label,
        "n": len(losses),
        "settings": json.dumps(row.settings),
    }
    record |= dict(zip(BUDGET, table.budget))
    record |= {name: row.started[0].config[name] for name in ("model", "size", "data", "train_on")}
    if not losses:
        return record
    record["validation_loss"] = row.mean_loss()
    record["standard_deviation"] = deviation(losses.values())
    if table.baseline and row is not table.baseline:
        gap = difference(losses, table.baseline.losses())
        record |= zip(("difference", "interval_95", "how"), gap)
    if table.budget[0]:
        # Of the difference, if there is one, and its interval: the baseline's points do not vary.
        loss, half = record["validation_loss"], record["interval_95"]
        if record["difference"] is not None:
            loss = table.baseline.mean_loss() + record["difference"]
        record["speed_up"] = speed_up(points, loss, table.budget[0])
        if half is not None:
            record["speed_up_low"] = speed_up(points, loss + half, table.budget[0])
            record["speed_up_high"] = speed_up(points, loss - half, table.budget[0])
    for name in ("updates", "rows", "stall_seconds"):
        if all(name in run.result for run in row.runs):
            record[name] = statistics.mean(run.result[name] for run in row.runs)
    for name in ("charged", "free", "wall"):
        seconds = statistics.mean(run.result[f"{name}_seconds"] for run in row.runs)
        record[f"{name}_hours"] = seconds / 3600
    for score, title in titles.items():
        for kind in ("last", "best"):
            unit, scores = row.scores(score, kind)
            if scores:
                record[f"{title} {kind}"] = statistics.mean(scores.values())
                record[f"{title} {kind} deviation"] = deviation(scores.values())
                record |= {f"{title} n": len(scores), f"{title} n of": unit}
    return record


def speed_up(points, loss, hours):
    """The budget at which the baseline reaches this loss, over this budget: a number, "<x" or ">x"
    outside the baseline's budgets, None if it has fewer than two or does not fall from each to the
    next.

    Between two budgets the baseline's final loss is taken to be a line over the logarithm of the
    budget. Only runs to their end count: in the middle of a longer run the learning rate has not
    decayed yet.
    """
    falls = all(above > below for (_, above), (_, below) in itertools.pairwise(points))
    if len(points) < 2 or not falls:
        return None
    if loss > points[0][1]:
        return f"<{points[0][0] / hours:.2g}"
    for (one, above), (other, below) in itertools.pairwise(points):
        if above >= loss >= below:
            share = (above - loss) / (above - below)
            return one * (other / one) ** share / hours
    return f">{points[-1][0] / hours:.2g}"


def number(value):
    """Of a speed-up: "<0.5" is drawn at 0.5."""
    return float(value.lstrip("<>")) if isinstance(value, str) else value


def formatted(value, form):
    return MISSING if value is None else value if isinstance(value, str) else format(value, form)


def markdown(records):
    """The table of one group for people."""
    lines = [
        "| method | n | validation loss ± SD | difference from the baseline, 95% | "
        "speed-up, 95% | updates | rows | charged h | free h | wall h | stalled s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    forms = {"updates": ",.0f", "rows": ",.0f"}
    forms |= dict.fromkeys(("charged_hours", "free_hours", "wall_hours", "stall_seconds"), ".3g")
    for r in records:
        loss = gap = MISSING
        if r["n"]:
            loss = f"{r['validation_loss']:.4f} ± {formatted(r['standard_deviation'], '.4f')}"
        if r["difference"] is not None:
            gap = f"{r['difference']:+.4f} ± {formatted(r['interval_95'], '.4f')} ({r['how']})"
        faster = formatted(r["speed_up"], ".2f")
        if r["speed_up_low"] is not None:
            bounds = (formatted(r[f"speed_up_{end}"], ".2f") for end in ("low", "high"))
            faster += f" ({' to '.join(bounds)})"
        cells = [r["method"], str(r["n"]), loss, gap, faster]
        cells += [formatted(r[name], form) for name, form in forms.items()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def comparisons(table):
    """Which of a table's differences exceed their interval: each at 95%, and all together. If k
    methods change nothing, about k / 20 exceed a 95% interval by chance; so together they are held
    to intervals of 1 - 0.05 / k (Bonferroni). "" without an interval."""
    if not table.baseline:
        return ""
    theirs = table.baseline.losses()
    others = {row.label: row.losses() for row in table.rows if row is not table.baseline}
    others = {
        label: ours
        for label, ours in others.items()
        if ours and difference(ours, theirs)[1] is not None
    }

    def exceeding(confidence):
        found = {label: difference(ours, theirs, confidence) for label, ours in others.items()}
        return ", ".join(label for label, gap in found.items() if abs(gap[0]) > gap[1]) or "none"

    count = len(others)
    if not count:
        return ""
    together = exceeding(1 - 0.05 / count)
    return (
        f"comparisons: {count}; 95% intervals that exclude zero: {exceeding(0.95)}; after "
        f"Bonferroni correction: {together}"
    )


def changes(tables):
    """Does a gain shrink as the budget grows? For the tables of one family, by budget: Markdown of
    how each method's difference from one baseline, by seed, changes from its shortest budget to its
    longest. "" without a method that has two budgets."""
    gaps = collections.defaultdict(list)  # {labels: [(budget, {seed: difference})]}
    for table in tables:
        theirs = table.baseline.losses() if table.baseline else {}
        for row in table.rows:
            own = row.losses()
            gap = {seed: own[seed] - theirs[seed] for seed in own.keys() & theirs.keys()}
            if gap and row is not table.baseline:
                gaps[row.label, table.baseline.label].append((table.budget_title, gap))
    several = {label: own for (label, _), own in gaps.items() if len(own) > 1}
    if not several:
        return ""
    lines = ["| method | from | to | change in difference, 95% |", "|---|---|---|---|"]
    for label, [(shortest, first), *_, (longest, last)] in several.items():
        mean, half, how = difference(last, first)
        change = f"{mean:+.4f} ± {formatted(half, '.4f')} ({how})"
        lines.append(f"| {label} | {shortest} | {longest} | {change} |")
    return "\n".join(lines)


def titles_of(runs):
    """{Score: title} of all kinds of scores that the runs have: what tells it from the others of
    its task is named."""
    found = sorted({score for run in runs for score in run.scores})
    setups = {score: json.loads(score.recipe) | json.loads(score.data) for score in found}
    titles = {}
    for score, setup in setups.items():
        alike = [setups[other] for other in found if other[:3] == score[:3]]
        telling = [name for name in setup if any(other.get(name) != setup[name] for other in alike)]
        titles[score] = " ".join(
            [
                score.suite,
                *["untrained"] * score.untrained,
                score.task,
                score.metric,
                *(f"{name}={setup[name]}" for name in telling),
            ]
        )
    return titles


def downstream_markdown(rows, titles):
    """Scores after the last epoch, and the best one, by task, what pre-training adds to them, and
    how they were made; "" if there are none."""
    runs = [run for row in rows for run in row.runs]
    present = [score for score in titles if any(score in run.scores for run in runs)]
    if not present:
        return ""
    header = " | ".join(titles[score] for score in present)
    lines = [f"| method | {header} |", "|---" * (len(present) + 1) + "|"]
    gains = []
    for row in rows:
        cells = []
        for score in present:
            unit, last = row.scores(score, "last")
            if not last:
                cells.append(MISSING)
                continue
            best = row.scores(score, "best")[1]
            both = (tasks.percent(kind.values(), unit) for kind in (last, best))
            cells.append(", best ".join(both))
            _, untrained = row.scores(score._replace(untrained=True), "last")
            if untrained and not score.untrained:
                gains.append(f"{row.label}, {titles[score]}, {gain(unit, last, untrained)}")
        lines.append(f"| {row.label} | {' | '.join(cells)} |")
    recipes = grouped(present, lambda score: (score.suite, score.recipe))
    for (suite, recipe), scores in recipes.items():
        own = dict.fromkeys(score.task for score in scores)
        settings = (f"{name} {value}" for name, value in json.loads(recipe).items())
        gains.append(f"{suite} ({', '.join(own)}): {', '.join(settings)}")
    return "\n".join([*lines, "", *gains])


def gain(unit, trained, untrained):
    """What pre-training adds to a score, in points."""
    if unit == "pre-training":
        # They have no partner among the untrained, whose seeds are of the fine-tuning: two samples,
        # not pairs.
        trained = {(unit, seed): score for seed, score in trained.items()}
    mean, half, how = difference(trained, untrained)
    interval = MISSING if half is None else f"{100 * half:.1f}"
    return (
        f"last epoch: pre-trained minus untrained {100 * mean:+.1f} ± {interval} points, 95% over "
        f"{unit} seeds ({how})"
    )


# -- Figures ---------------------------------------------------------------------------------------


# Okabe and Ito's, which the colour-blind tell apart, but for yellow, too pale on white.
COLORS = "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
STYLES = [dict(color=color, linestyle=style) for style in ("-", "--", ":") for color in COLORS]
# Ticks: powers of two, and some near 1, where most speed-ups are.
SPEED_UPS = sorted({*(2.0**power for power in range(-6, 7)), 0.65, 0.8, 1.25, 1.5})
FONT_SIZE = 12  # points: readable at half the width of a page


def name_lines(axes):
    """Each line's name right of the axes, as near to its end as there is room."""
    axes.autoscale_view()  # or the limits are set later only
    named = [line for line in axes.lines if not line.get_label().startswith("_")]
    ends = [(line.get_xdata()[-1], line.get_ydata()[-1]) for line in named]
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = [to_axes.transform(end)[1] for end in ends]
    order = sorted(range(len(named)), key=wanted.__getitem__)
    line_height = 1.25 * FONT_SIZE / 72 / (axes.bbox.height / axes.figure.dpi)  # 72 points an inch
    heights, lowest, highest = {}, -math.inf, 1.0
    for index in order:
        heights[index] = lowest = max(wanted[index], lowest + line_height)
    for index in reversed(order):
        heights[index] = min(heights[index], highest)
        highest = heights[index] - line_height
    for index, line in enumerate(named):
        to_its_left = dict(relpos=(0, 0.5), patchA=None)
        axes.annotate(
            line.get_label(),
            ends[index],
            (1.06, heights[index]),
            textcoords="axes fraction",
            verticalalignment="center",
            arrowprops=dict(arrowstyle="-", color=line.get_color(), **to_its_left),
        )


class Figures:
    """Draws into a folder, a method in one style everywhere; `paths` are the files."""

    def __init__(self, folder, labels):
        try:
            import matplotlib
        except ImportError:
            raise UserError("--figures needs one more package: pip install matplotlib") from None
        matplotlib.use("Agg")
        matplotlib.rcParams["svg.hashsalt"] = "report"  # the same runs, the same file
        matplotlib.rcParams["text.parse_math"] = False  # a $ in a name is one
        matplotlib.rcParams["font.size"] = FONT_SIZE
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.paths = folder, []
        # Those that are in most tables get the plainest lines.
        count = collections.Counter(labels)
        others = sorted(set(labels) - {"baseline"}, key=lambda label: (-count[label], label))
        self.styles = dict(zip(others, itertools.cycle(STYLES)))
        self.styles["baseline"] = dict(color="black", linestyle="-")

    @contextlib.contextmanager
    def axes(self, name, title, **labels):
        """New axes, saved afterwards if there is something on them. The background is white, also
        where the page is dark."""
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(6.5, 4.5))
        axes.set(title=title, **labels)
        axes.spines[["top", "right"]].set_visible(False)
        yield axes
        if axes.lines:
            name_lines(axes)
            path = self.folder / f"{name}-{file_name(title)}.svg"
            if path in self.paths:  # titles that differ in what a file's name cannot hold
                path = path.with_stem(f"{path.stem}-{len(self.paths)}")
            with written_whole(path) as file:
                figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})
            self.paths.append(path)
        pyplot.close(figure)

    def line(self, axes, label, xs, ys, name=None):
        axes.plot(xs, ys, label=name or label, marker="o", markersize=3, **self.styles[label])

    def losses(self, table):
        """Validation loss over the budget: the mean of a method's seeds, and a band over all."""
        xlabel = "updates" if table.budget[1] else f"hours of {table.reference}"
        ylabel = "validation loss (nats); band: all seeds"
        late = []  # the second half, which sets the scale: the beginning is much higher
        with self.axes("loss", table.title, xlabel=xlabel, ylabel=ylabel) as axes:
            for row in table.rows:
                curves = [run.validations for run in row.runs if run.validations]
                late += [loss for curve in curves for _, loss in curve[len(curve) // 2 - 1 :]]
                if len({len(curve) for curve in curves}) != 1:  # not all were validated as often
                    for curve in curves:
                        self.line(axes, row.label, *zip(*curve))
                    continue
                places = list(zip(*curves))
                spent = [statistics.mean(hours for hours, _ in place) for place in places]
                losses = [[loss for _, loss in place] for place in places]
                means = list(map(statistics.mean, losses))
                self.line(axes, row.label, spent, means, f"{row.label} ({len(curves)})")
                lowest, highest = list(map(min, losses)), list(map(max, losses))
                color = self.styles[row.label]["color"]
                axes.fill_between(spent, lowest, highest, color=color, alpha=0.2)
            if margin := 0.05 * (max(late, default=0) - min(late, default=0)):
                axes.set_ylim(min(late) - margin, max(late) + margin)

    def by_budget(self, name, title, ylabel, points, ratio):
        """`points`: {label: [(budget in hours, value, lowest, highest)]}; a value may be missing.
        What is only known to lie below or above a number, as "<0.5", is a triangle there. A ratio
        has a line at 1, and twice is as far from it as half."""
        xlabel = "budget, hours of the reference"
        with self.axes(name, title, xscale="log", xlabel=xlabel, ylabel=ylabel) as axes:
            budgets = sorted({hours for own in points.values() for hours, *_ in own})
            for place, (label, own) in enumerate(points.items()):
                aside = 1 + 0.02 * (place - len(points) / 2)  # or intervals cover each other
                known = [(hours * aside, *rest) for hours, *rest in own if rest[0] is not None]
                if not known:
                    continue
                self.line(
                    axes, label, *zip(*((hours, number(value)) for hours, value, *_ in known))
                )
                color = self.styles[label]["color"]
                for hours, value, *bounds in known:
                    ends = [number(value if end is None else end) for end in bounds]
                    axes.plot([hours, hours], ends, color=color, linewidth=1)
                    for open_ended in (one for one in (value, *bounds) if isinstance(one, str)):
                        marker = {"<": "v", ">": "^"}[open_ended[0]]
                        axes.plot(hours, number(open_ended), marker, color=color, markersize=6)
            if ratio and axes.lines:
                axes.axhline(1, color="black", linewidth=0.5)
                axes.set_yscale("log", base=2)
                lowest, highest = axes.get_ylim()
                ticks = [tick for tick in SPEED_UPS if lowest <= tick <= highest]
                axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
                axes.set_yticks([], minor=True)
            axes.set_xticks(budgets, [f"{hours:g}" for hours in budgets])
            axes.set_xticks([], minor=True)


def bounds(record, column):
    """(lowest, highest): of a speed-up its interval, of a loss a standard deviation around it."""
    if column == "speed_up":
        return record["speed_up_low"], record["speed_up_high"]
    loss, half = record["validation_loss"], record["standard_deviation"] or 0.0
    return loss - half, loss + half


def draw(tables, records, folder):
    """Writes the figures; returns their paths."""
    figures = Figures(folder, [row.label for table in tables for row in table.rows])
    for table in tables:
        figures.losses(table)
    of_hours = [record for record in records if record["budget_hours"] and record["n"]]
    for family, own in grouped(of_hours, lambda record: record["family"]).items():
        every = grouped(own, lambda record: record["method"])
        methods = {label: of_method for label, of_method in every.items() if len(of_method) > 1}
        if not methods:
            continue
        if single := ", ".join(sorted(every.keys() - methods.keys())):
            print(
                f"{family}: not in the figures against the budget, with one budget each: {single}"
            )
        title = f"{family}, hours of {own[0]['reference']}"
        for column, name, ylabel, ratio in (
            ("validation_loss", "budgets", "final validation loss (nats), ± deviation", False),
            ("speed_up", "speed-up", "speed-up over the baseline, 95%", True),
        ):
            points = {
                label: [(r["budget_hours"], r[column], *bounds(r, column)) for r in of_method]
                for label, of_method in methods.items()
            }
            figures.by_budget(name, title, ylabel, points, ratio)
    return figures.paths


def file_name(text):
    return re.sub(r"[^\w.]+", "-", text).strip("-")


# -- The command -----------------------------------------------------------------------------------


def baseline_points(tables):
    """{family: [(budget in hours, final loss) of its baseline]}"""
    found = collections.defaultdict(list)
    for table in tables:
        if table.baseline and table.budget[0]:
            label = table.baseline.label
            found[table.family, label].append((table.budget[0], table.baseline.mean_loss()))
    return found


def print_table(table, records, titles, points):
    """All that people should know of a table's runs."""
    print(f"## {table.title}\n\n{markdown(records)}\n")
    if any(record["speed_up"] is not None for record in records):
        losses = ", ".join(f"{loss:.4f} after {hours:g} h" for hours, loss in points)
        print(f"speed-ups are read off the baseline's mean losses, taken as exact: {losses}")
    elif table.budget[0] and any(record["difference"] is not None for record in records):
        print("speed-ups: none; they need baseline losses that fall over two budgets or more")
    if compared := comparisons(table):
        print(compared)
    if floor := noise_floor(table):
        count, one_run, degrees, least = floor
        print(
            f"noise floor: a residual standard deviation of {one_run:.4f} after removing the means "
            f"of row and seed ({count} rows, {degrees} degrees of freedom, equal variances "
            f"assumed); two given rows differ by up to {least:.4f} by chance (95%)"
        )
    theirs = table.baseline.settings if table.baseline else {}
    for row in table.rows:
        own = row.settings if row is table.baseline else row.settings.items() - theirs.items()
        own = [f"{name} {value}" for name, value in sorted(dict(own).items()) if name != "method"]
        print(f"{row.label}: {', '.join(own) or 'as the baseline'}")
        needed = [run.result.get("prerequisites", {}) for run in row.runs]
        for name in dict.fromkeys(itertools.chain(*needed)):
            seconds = [one[name]["charged_seconds"] for one in needed if name in one]
            hours = statistics.mean(seconds) / 3600
            print(f"{row.label}: its {name} cost {hours:.3g} h more, uncharged")
    finished = [run.result for row in table.rows for run in row.runs]
    names = dict(commit="commits", device="devices", threads="CPU threads", processes="processes")
    for key, title in names.items():
        values = sorted({str(result.get(key) or MISSING) for result in finished})
        print(f"{title}: {', '.join(values) or MISSING}")
    for row in table.rows if table.baseline and table.budget[0] else ():
        if seeds := ", ".join(map(str, seeds_apart(row, table.baseline))):
            print(f"{row.label}: on another device than the baseline: seed {seeds}")
    for name, folders in differing_files(table).items():
        versions = "; ".join(
            f"{version}: {', '.join(map(str, runs))}" for version, runs in folders.items()
        )
        print(f"methods/{name}.py differs between these runs: {versions}")
    if scores := downstream_markdown(table.rows, titles):
        print(
            "\nFine-tuned, in percent, mean ± standard deviation over pre-training seeds; over "
            "fine-tuning seeds where there is one pre-training seed, or none (untrained):\n\n"
            f"{scores}"
        )
    print()


def write_csv(path, records):
    extra = sorted({name for record in records for name in record} - {*COLUMNS, "family"})
    with written_whole(path) as file:
        text = io.TextIOWrapper(file, newline="", write_through=True)
        writer = csv.DictWriter(text, [*COLUMNS, *extra], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(records)
        text.detach()


@exits_on_user_error
def main(arguments=None):
    parser = Parser(description=__doc__, prog="report.py")
    parser.add_argument("runs", nargs="+", help="folders of runs, or folders with runs in them")
    csv_help = "a file: write the table there, too, with unrounded numbers"
    parser.add("csv", Option(None, csv_help, kind=str))
    parser.add("figures", Option(None, "a folder: draw figures into it (SVG)", kind=str))
    options = parser.parse_args(arguments)
    runs = find_runs(options.runs)
    tables, titles, records = tables_of(runs), titles_of(runs), []
    points = baseline_points(tables)
    for table in tables:
        own_points = points.get((table.family, table.baseline and table.baseline.label), [])
        here = [record_of(row, table, own_points, titles) for row in table.rows]
        print_table(table, here, titles, own_points)
        records += here
    for family, own in grouped(tables, lambda table: table.family).items():
        if changed := changes(own):
            print(f"## {family}, from the shortest budget to the longest\n\n{changed}\n")
    for run in runs:
        for problem in run.problems:
            print(f"{run.folder}: {problem}")
    if options.csv:
        write_csv(options.csv, records)
        print(f"written: {options.csv}")
    if options.figures:
        for path in draw(tables, records, Path(options.figures)):
            print(f"drawn: {path}")


if __name__ == "__main__":
    main()
