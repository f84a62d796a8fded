"""Finished runs to tables and figures. Changes nothing in a run's folder.

    python report.py runs/                     every run below a folder, as Markdown
    python report.py RUN RUN ... --csv=FILE    the same table as CSV
    python report.py runs/ --figures=FOLDER    and figures (pip install matplotlib)

A table has the runs that may be compared: of one model and size, on the same rows and tokens, under
one budget of one reference. In it a row is a method with one set of hyper-parameters, and its runs
are seeds. A difference to the baseline is the mean over the seeds that both have, run by run; with
fewer than two of them, where both have two seeds or more, it is that of the means (Welch). Its 95%
interval is Student's, for so few runs. What is missing is shown as missing; what is unfinished or
damaged is named.
"""

import collections
import csv
import itertools
import json
import math
import re
import statistics
import typing
import zlib
from dataclasses import dataclass
from pathlib import Path

import tasks
from errors import UserError, exits_on_user_error
from flags import Parser
from runs import CONFIG, check_record, read_log, read_record, status

MISSING = "–"
# Settings that runs must agree in to be compared at all; with the budget, the reference and the
# corpus as it was prepared.
COMPARED = (
    "model",
    "size",
    "data",
    "vocabulary",
    "row_length",
    "validation_rows",
    "holdout",
    "train_on",
)
BUDGET = ("budget_hours", "budget_steps")
# What two seeds of one experiment may differ in. (Threads count only where hours are plain time,
# see `family_of`; the precision, compiling and the micro-batch decide how much an hour buys, and
# are settings like any other.)
NOT_A_SETTING = {
    "seed",
    "device",
    "threads",
    "reference",
    "checkpoint_minutes",
    "out",
    "yes",
    "validations",
    "options",
    *COMPARED,
    *BUDGET,
}
COMPARED_TYPES = dict.fromkeys(COMPARED, (str, int, float)) | {
    "budget_hours": (float, None),
    "budget_steps": (int, None),
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
    config: dict  # {} if it cannot be read
    result: dict  # {} if the run is unfinished
    validations: list  # [charged hours or updates, validation loss], in order
    scores: dict  # {Score: {"last": {seed of the fine-tuning: score}, "best": ...}}
    problems: list  # why it is in no mean, and what is damaged; empty for a finished, whole run


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
        stored = read_record(folder / "config.json", CONFIG | {"config": COMPARED_TYPES})
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
    for name in sorted(ended_with.keys() - NOT_A_SETTING):
        if ended_with[name] != config.get(name):
            problems.append(
                f"resumed with another {name}, {config.get(name)} and then {ended_with[name]}; it "
                "stands where it began"
            )
    result = result and result | {name: stored[name] for name in ("corpus", "reference")}
    validations, damage = read_validations(folder, config)
    return Run(folder, config, result, validations, scores, problems + [damage] * bool(damage))


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

# Student's t for a two-sided 95% interval, by degrees of freedom from 1; beyond the table the next
# smaller entry, which is safe.
T_95 = [
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
]  # fmt: skip


def t_95(degrees):
    return T_95[min(max(1, math.floor(degrees)), len(T_95)) - 1]


def difference(ours, baseline):
    """(mean, half the width of its 95% interval or None, how) of the difference between two
    experiments.

    Args:
        ours, baseline: {seed: [losses]}; several runs of a seed count as their mean.
    """
    ours, baseline = (
        {seed: statistics.mean(values) for seed, values in runs.items()}
        for runs in (ours, baseline)
    )
    common = sorted(set(ours) & set(baseline))
    if len(common) >= 2 or (common and min(len(ours), len(baseline)) < 2):
        differences = [ours[seed] - baseline[seed] for seed in common]
        half = (
            t_95(len(common) - 1) * statistics.stdev(differences) / len(common) ** 0.5
            if len(common) > 1
            else None
        )
        return statistics.mean(differences), half, f"paired, {len(common)}"
    mean = statistics.mean(ours.values()) - statistics.mean(baseline.values())
    if min(len(ours), len(baseline)) < 2:
        return mean, None, "unpaired"
    # Welch 1947: unequal variances.
    parts = [statistics.variance(runs.values()) / len(runs) for runs in (ours, baseline)]
    degrees = (
        sum(parts) ** 2
        / sum(part**2 / (len(runs) - 1) for part, runs in zip(parts, (ours, baseline)))
        if sum(parts)
        else 1
    )
    return mean, t_95(degrees) * sum(parts) ** 0.5, "unpaired"


# -- Rows and tables -------------------------------------------------------------------------------


def settings_of(run):
    """Everything else that a person can set and that decides a result: {flag: value}."""
    return {
        name: value
        for name, value in (run.config | run.config["options"]).items()
        if name not in NOT_A_SETTING
    }


def family_of(run):
    """What runs must agree in to be compared, but for the budget: {name: value}. An unfinished run
    has no corpus and no probe on record. Where hours are plain time (--reference=this) they are
    this device's with so many threads, and no other's."""
    config, result = run.config, run.result
    family = {name: config[name] for name in COMPARED} | {
        "reference": Path(config["reference"]).stem
    }
    if result:
        probe_seconds = result["reference"]["probe_seconds"]
        family |= {"corpus": result["corpus"], "probe_seconds": probe_seconds}
        if config["budget_hours"] and not probe_seconds:
            family |= {name: result.get(name) for name in ("device", "threads", "processes")}
    return family


@dataclass
class Row:
    """One experiment: a method with its settings, in one table; `runs` are its finished ones."""

    label: str  # the method, and the settings that tell it from its other rows
    settings: dict
    runs: list

    def losses(self):
        """{seed: [final validation losses]}"""
        found = collections.defaultdict(list)
        for run in self.runs:
            found[run.config["seed"]].append(run.result["validation_loss"])
        return found

    def scores(self, score):
        """A kind of score by seed of the fine-tuning, over all runs: {"last": {seed: [scores]},
        "best": ...}; {} without any."""
        found = {}
        for run in self.runs:
            for kind, seeds in run.scores.get(score, {}).items():
                for seed, value in seeds.items():
                    found.setdefault(kind, {}).setdefault(seed, []).append(value)
        return found

    def independent_scores(self, score):
        """(the unit, {"last": [scores], "best": ...}) to average: of each pre-training the mean,
        where seeds of it have the score and it depends on them; else of each fine-tuning seed. None
        without any."""
        seeds = {run.config["seed"] for run in self.runs if score in run.scores}
        if score.untrained or len(seeds) < 2:
            found = self.scores(score)
            return (
                (
                    "fine-tuning",
                    {
                        kind: list(map(statistics.mean, values.values()))
                        for kind, values in found.items()
                    },
                )
                if found
                else None
            )
        found = {"last": collections.defaultdict(list), "best": collections.defaultdict(list)}
        for run in self.runs:
            for kind, values in run.scores.get(score, {}).items():
                found[kind][run.config["seed"]].append(statistics.mean(values.values()))
        return "pre-training", {
            kind: list(map(statistics.mean, values.values())) for kind, values in found.items()
        }

    def mean_loss(self):
        """The mean over seeds, one that ran twice counts once; None without a run."""
        return (
            statistics.mean(statistics.mean(values) for values in self.losses().values())
            if self.runs
            else None
        )


@dataclass
class Table:
    """Runs of one family under one budget, a row an experiment: the baseline first, then by mean
    loss."""

    family: str  # for people: tables of one family differ in their budgets only
    budget: tuple  # (hours, None) or (None, updates)
    reference: str
    rows: list

    @property
    def title(self):
        hours, updates = self.budget
        budget = f"{updates} updates" if updates else f"{hours:g} h of {self.reference}"
        return f"{self.family}, {budget}"

    @property
    def baseline(self):
        """The row that the others are compared with: the one called so, or else the baseline's with
        the most runs here."""
        rows = [row for row in self.rows if row.settings["method"] == "baseline" and row.runs]
        return max(rows, key=lambda row: (row.label == "baseline", len(row.runs)), default=None)


def labels_of(runs):
    """{settings as JSON: label} of a family's experiments. In each method one goes by the method's
    name alone: the one with the most finished runs at all budgets, of several the one with the
    lowest loss."""
    found = collections.defaultdict(list)
    for run in runs:
        found[json.dumps(settings_of(run), sort_keys=True)].append(run)
    labels = {}
    for method in {run.config["method"] for run in runs}:
        mine = {
            text: [run.result["validation_loss"] for run in members if run.result]
            for text, members in found.items()
            if members[0].config["method"] == method
        }
        plain_text = min(
            mine, key=lambda text: (-len(mine[text]), min(mine[text], default=math.inf), text)
        )
        plain = json.loads(plain_text)
        for text in mine:
            own = json.loads(text)
            telling = [
                name
                for name in sorted(own.keys() | plain.keys())
                if own.get(name) != plain.get(name)
            ]
            labels[text] = " ".join([method, *(f"{name}={own.get(name)}" for name in telling)])
    return labels


def tables_of(runs):
    """The `Table`s of all runs whose configuration can be read. An unfinished run stands with the
    first family that agrees with it in what is on record."""
    families = []  # [family, its runs]
    for run in sorted((run for run in runs if run.config), key=lambda run: not run.result):
        family = family_of(run)
        place = next(
            (
                entry
                for entry in families
                if (entry[0] == family if run.result else family.items() <= entry[0].items())
            ),
            None,
        )
        if place:
            place[1].append(run)
        else:
            families.append((family, [run]))
    tables, used = [], collections.Counter()
    for family, members in families:
        alike = [
            other
            for other, _ in families
            if all(other[name] == family[name] for name in ("model", "size", "data"))
        ]
        telling = [
            name
            for name in family
            if name not in ("model", "size", "data")
            and any(other.get(name) != family[name] for other in alike)
        ]
        name = ", ".join(
            [
                f"{family['model']}-{family['size']} on {family['data']}",
                *(f"{part} {short(family[part])}" for part in telling),
            ]
        )
        used[name] += 1
        if used[name] > 1:  # references that differ in a digit that is not shown
            name += f" ({used[name]})"
        labels, budgets = (
            labels_of(members),
            collections.defaultdict(lambda: collections.defaultdict(list)),
        )
        for run in members:
            budgets[tuple(run.config[part] for part in BUDGET)][
                json.dumps(settings_of(run), sort_keys=True)
            ].append(run)
        for budget, experiments in budgets.items():
            rows = [
                Row(labels[text], json.loads(text), [run for run in own if run.result])
                for text, own in experiments.items()
            ]
            rows.sort(
                key=lambda row: (
                    row.label != "baseline",
                    not row.runs,
                    row.mean_loss() or 0.0,
                    row.label,
                )
            )
            tables.append(Table(name, budget, family["reference"], rows))
    return sorted(
        tables, key=lambda table: (table.family, table.budget[1] or 0, table.budget[0] or 0)
    )


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


# -- Tables ----------------------------------------------------------------------------------------

COLUMNS = [
    "group",
    "model",
    "size",
    "data",
    "train_on",
    "reference",
    "budget_hours",
    "budget_steps",
    "method",
    "n",
    "validation_loss",
    "standard_deviation",
    "difference",
    "interval_95",
    "how",
    "speed_up",
    "updates",
    "rows",
    "charged_hours",
    "free_hours",
    "wall_hours",
    "stalls",
    "settings",
]


def record_of(row, table, points, titles):
    """A row of a table as {column: value}, None where it is missing. `points`: the baseline's
    (budget hours, final loss) at all budgets of the family; `titles`: of the fine-tuning's
    scores."""
    means = [statistics.mean(values) for values in row.losses().values()]
    record = dict.fromkeys(COLUMNS) | {
        "group": table.title,
        "reference": table.reference,
        "method": row.label,
        "n": len(means),
        "settings": json.dumps(row.settings),
    }
    record |= dict(zip(BUDGET, table.budget))
    if not means:
        return record
    record |= {name: row.runs[0].config[name] for name in ("model", "size", "data", "train_on")}
    record |= {
        "validation_loss": row.mean_loss(),
        "standard_deviation": statistics.stdev(means) if len(means) > 1 else None,
    }
    if table.baseline and row is not table.baseline:
        record["difference"], record["interval_95"], record["how"] = difference(
            row.losses(), table.baseline.losses()
        )
    if table.budget[0]:
        record["speed_up"] = speed_up(points, record["validation_loss"], table.budget[0])
    for name, value in (
        ("updates", lambda result: result["updates"]),
        ("rows", lambda result: result["rows"]),
        ("charged_hours", lambda result: result["charged_seconds"] / 3600),
        ("free_hours", lambda result: result["free_seconds"] / 3600),
        ("wall_hours", lambda result: result["wall_seconds"] / 3600),
        ("stalls", lambda result: result.get("stalls", 0)),
    ):
        record[name] = statistics.mean(value(run.result) for run in row.runs)
    for score, title in titles.items():
        if found := row.independent_scores(score):
            for kind, scores in found[1].items():
                record |= {
                    f"{title} {kind}": statistics.mean(scores),
                    f"{title} {kind} deviation": statistics.stdev(scores)
                    if len(scores) > 1
                    else None,
                }
            record |= {f"{title} n": len(found[1]["last"]), f"{title} n of": found[0]}
    return record


def speed_up(points, loss, hours):
    """The budget at which the baseline reaches this loss, over this budget: a number, "<x" or ">x"
    outside the baseline's budgets, None if it has fewer than two.

    Between two budgets the baseline's final loss is taken to be a line over the logarithm of the
    budget. Only runs to their end count: in the middle of a longer run the learning rate has not
    decayed yet.
    """
    if len(points) < 2:
        return None
    if loss > points[0][1]:
        return f"<{points[0][0] / hours:.2g}"
    for (one, above), (other, below) in itertools.pairwise(points):
        if above >= loss >= below:
            share = (above - loss) / (above - below) if above > below else 0.0
            return one * (other / one) ** share / hours
    return f">{points[-1][0] / hours:.2g}"


def formatted(value, form):
    return MISSING if value is None else value if isinstance(value, str) else format(value, form)


def markdown(records):
    """The table of one group for people."""
    lines = [
        "| method | n | validation loss | difference to the baseline, 95% | speed-up | updates | "
        "rows | charged h | free h | wall h | stalls |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        loss = (
            f"{r['validation_loss']:.4f} ± {formatted(r['standard_deviation'], '.4f')}"
            if r["n"]
            else MISSING
        )
        gap = MISSING
        if r["difference"] is not None:
            gap = f"{r['difference']:+.4f} ± {formatted(r['interval_95'], '.4f')} ({r['how']})"
        cells = [
            r["method"],
            r["n"],
            loss,
            gap,
            formatted(r["speed_up"], ".2f"),
            formatted(r["updates"], ",.0f"),
            formatted(r["rows"], ",.0f"),
        ]
        cells += [
            formatted(r[name], ".3g") for name in ("charged_hours", "free_hours", "wall_hours")
        ] + [formatted(r["stalls"], ".3g")]
        lines.append(f"| {' | '.join(map(str, cells))} |")
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
    present = [score for score in titles if any(row.scores(score) for row in rows)]
    if not present:
        return ""
    lines = [
        "| method | " + " | ".join(titles[score] for score in present) + " |",
        "|---" * (len(present) + 1) + "|",
    ]
    for row in rows:
        cells = []
        for score in present:
            unit, found = row.independent_scores(score) or (None, None)
            cells.append(
                ", best ".join(tasks.percent(found[kind], unit) for kind in ("last", "best"))
                if unit
                else MISSING
            )
        lines.append(f"| {row.label} | {' | '.join(cells)} |")
    lines.append("")
    for row, score in itertools.product(rows, present):
        found, untrained = row.independent_scores(score), row.scores(score._replace(untrained=True))
        if not score.untrained and found and untrained:
            unit, kinds = found
            # Pre-trainings have no partner among the untrained, whose seeds are of the fine-tuning:
            # two samples, not pairs.
            ours = (
                row.scores(score)["last"]
                if unit == "fine-tuning"
                else {(unit, number): [value] for number, value in enumerate(kinds["last"])}
            )
            mean, half, how = difference(ours, untrained["last"])
            interval = MISSING if half is None else f"{100 * half:.1f}"
            lines.append(
                f"{row.label}, {titles[score]}, last epoch: pre-trained minus untrained "
                f"{100 * mean:+.1f} ± {interval} points, 95% over {unit} seeds ({how})"
            )
    recipes = collections.defaultdict(list)
    for score in present:
        if score.task not in recipes[score.suite, score.recipe]:
            recipes[score.suite, score.recipe].append(score.task)
    lines += [
        f"{suite} ({', '.join(own)}): "
        f"{', '.join(f'{name} {value}' for name, value in json.loads(recipe).items())}"
        for (suite, recipe), own in recipes.items()
    ]
    return "\n".join(lines)


# -- Figures ---------------------------------------------------------------------------------------


def draw(tables, points, speed_ups, folder):
    """Writes the figures; returns their paths. `points`: {family: {label: [(budget hours, final
    loss)]}}; `speed_ups` as `points`, of what `speed_up` said."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("--figures needs one more package: pip install matplotlib") from None
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "report"  # the same runs, the same file
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    # One colour a method in all figures; matplotlib has ten, then they come again.
    labels = sorted({row.label for table in tables for row in table.rows} - {"baseline"})
    colors = {"baseline": "black"} | {label: f"C{number}" for number, label in enumerate(labels)}

    def save(figure, name):
        path = folder / f"{name}.svg"
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
        pyplot.close(figure)
        paths.append(path)

    for table in tables:
        figure, axes = pyplot.subplots(figsize=(7, 4.5))
        for row in table.rows:
            curves = [run.validations for run in row.runs if run.validations]
            if curves and len({len(curve) for curve in curves}) == 1:  # all were validated as often
                places = list(zip(*curves))
                spent = [statistics.mean(point[0] for point in place) for place in places]
                losses = [[point[1] for point in place] for place in places]
                axes.plot(
                    spent,
                    list(map(statistics.mean, losses)),
                    marker="o",
                    markersize=3,
                    color=colors[row.label],
                    label=f"{row.label} ({len(curves)})",
                )
                axes.fill_between(
                    spent,
                    list(map(min, losses)),
                    list(map(max, losses)),
                    color=colors[row.label],
                    alpha=0.2,
                )
            else:
                for curve in curves:
                    axes.plot(
                        *zip(*curve),
                        marker="o",
                        markersize=3,
                        color=colors[row.label],
                        label=row.label,
                    )
        axes.set(
            title=table.title,
            ylabel="validation loss (nats); band: all seeds",
            xlabel="updates" if table.budget[1] else f"hours of {table.reference}",
        )
        if axes.lines:
            axes.legend(fontsize=8)
            save(figure, "loss-" + file_name(table.title))
        else:
            pyplot.close(figure)
    for family, by_method in points.items():
        if max(map(len, by_method.values())) < 2:
            continue
        reference = next(table.reference for table in tables if table.family == family)
        title = f"{family}, hours of {reference}"
        budgets = sorted({hours for own in by_method.values() for hours, _ in own})

        def by_budget(axes, name, ylabel):
            axes.set(
                title=title, xscale="log", xlabel="budget, hours of the reference", ylabel=ylabel
            )
            axes.set_xticks(budgets, [f"{hours:g}" for hours in budgets])
            axes.set_xticks([], minor=True)
            axes.legend(fontsize=8)
            save(axes.figure, f"{name}-{file_name(title)}")

        figure, axes = pyplot.subplots(figsize=(7, 4.5))
        for label, own in by_method.items():
            axes.plot(*zip(*own), marker="o", color=colors[label], label=label)
        by_budget(axes, "budgets", "final validation loss (nats)")
        figure, axes = pyplot.subplots(figsize=(7, 4.5))
        for label, own in speed_ups[family].items():
            # Inside the baseline's budgets.
            if known := [point for point in own if isinstance(point[1], float)]:
                axes.plot(*zip(*known), marker="o", color=colors[label], label=label)
        if axes.lines:
            axes.axhline(1.0, color="black", linewidth=0.5)
            by_budget(axes, "speed-up", "baseline's budget for the same loss / budget")
        else:
            pyplot.close(figure)
    return paths


def file_name(text):
    return re.sub(r"[^\w.]+", "-", text).strip("-")


# -- The command -----------------------------------------------------------------------------------


@exits_on_user_error
def main(arguments=None):
    parser = Parser(description=__doc__, prog="report.py")
    parser.add_argument("runs", nargs="+", help="folders of runs, or folders with runs in them")
    parser.add_argument(
        "--csv", metavar="FILE", help="write the table there, too, with unrounded numbers"
    )
    parser.add_argument("--figures", metavar="FOLDER", help="draw figures into it (SVG)")
    options = parser.parse_args(arguments)
    runs = find_runs(options.runs)
    tables = tables_of(runs)
    points, speed_ups, records, titles = {}, {}, [], titles_of(runs)
    for table in tables:
        for row in table.rows:
            if row.runs and table.budget[0]:
                points.setdefault(table.family, {}).setdefault(row.label, []).append(
                    (table.budget[0], row.mean_loss())
                )
    for table in tables:
        here = [
            record_of(
                row,
                table,
                points.get(table.family, {}).get(table.baseline and table.baseline.label, []),
                titles,
            )
            for row in table.rows
        ]
        records += here
        for record in here:
            speed_ups.setdefault(table.family, {}).setdefault(record["method"], []).append(
                (table.budget[0], record["speed_up"])
            )
        print(f"## {table.title}\n\n{markdown(here)}\n")
        if table.baseline:
            settings = table.baseline.settings.items()
            settings = [f"{name} {value}" for name, value in settings if name != "method"]
            print(f"{table.baseline.label}: {', '.join(settings)}")
        finished = [run.result for row in table.rows for run in row.runs]
        for title, what in (
            ("commits", "commit"),
            ("devices", "device"),
            ("processes", "processes"),
        ):
            values = sorted({str(result.get(what) or MISSING) for result in finished})
            print(f"{title}: {', '.join(values) or MISSING}")
        for name, folders in differing_files(table).items():
            versions = "; ".join(
                f"{version}: {', '.join(map(str, runs))}" for version, runs in folders.items()
            )
            print(f"methods/{name}.py differs between these runs: {versions}")
        if scores := downstream_markdown(table.rows, titles):
            print(
                "\nFine-tuned, in percent, mean ± standard deviation over pre-training seeds, or "
                f"with one of them, or untrained, over fine-tuning seeds:\n\n{scores}"
            )
        print()
    for run in runs:
        for problem in run.problems:
            print(f"{run.folder}: {problem}")
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            writer = csv.DictWriter(
                file,
                [*COLUMNS, *sorted({name for record in records for name in record} - set(COLUMNS))],
            )
            writer.writeheader()
            writer.writerows(records)
        print(f"written: {options.csv}")
    if options.figures:
        for path in draw(tables, points, speed_ups, Path(options.figures)):
            print(f"drawn: {path}")


if __name__ == "__main__":
    main()
