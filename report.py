"""Finished runs to tables and figures. Only reads run folders.

    python report.py runs/                     every run below a folder, as Markdown
    python report.py RUN RUN ... --csv=FILE    the same table as CSV
    python report.py runs/ --figures=FOLDER    and figures (pip install matplotlib)

Runs are compared within a setting: model, size, corpus, reference and budget. Within it a row is a method with one set
of hyper-parameters, and its runs are seeds. A difference to the baseline is the mean over the seeds that both have,
run by run; without common seeds it is that of the means (Welch). Its 95% interval is Student's, for so few runs.
What is missing is shown as missing, and runs that are unfinished or damaged are named.
"""

import collections
import csv
import itertools
import json
import math
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

import tasks
from errors import Parser, UserError, exits_on_user_error

MISSING = "–"
# What makes runs seeds of one experiment differ, or does not touch the result: everything else in config.json is a setting.
NOT_A_SETTING = {"seed", "device", "dtype", "compile", "micro_batch", "threads", "checkpoint_minutes", "out", "yes", "validations"}
OF_A_GROUP = ("model", "size", "data", "reference", "budget_hours", "budget_steps", "train_on")


@dataclass
class Run:
    """A folder that `train.py` made."""

    folder: Path
    config: dict  # {} if it cannot be read
    result: dict  # {} if the run is unfinished
    validations: list  # [charged hours or updates, validation loss], in order
    problem: str  # why it is in no mean; empty for a finished run


def read(folder):
    """A run folder, whatever its state: a `Run`."""
    config, result, problem = {}, {}, ""
    try:
        config = json.loads((folder / "config.json").read_text())
        missing = [name for name in (*OF_A_GROUP, "seed", "method", "options") if name not in config]
        if missing:
            raise ValueError(f"no {missing[0]} in it")
    except (OSError, ValueError, TypeError) as error:
        return Run(folder, {}, {}, [], f"damaged: config.json ({error})")
    try:
        result = json.loads((folder / "result.json").read_text())
        if not math.isfinite(result["validation_loss"]):
            raise ValueError(f"a validation loss of {result['validation_loss']}")
        for name in ("updates", "rows", "charged_seconds", "free_seconds", "cut_seconds", "wall_seconds", "corpus"):
            result[name]
    except FileNotFoundError:
        problem = "unfinished"
    except KeyError as error:
        result, problem = {}, f"damaged: result.json (no {error} in it)"
    except (OSError, ValueError, TypeError) as error:
        result, problem = {}, f"damaged: result.json ({error})"
    return Run(folder, config, result, read_validations(folder, config), problem)


def read_validations(folder, config):
    """[budget spent, validation loss] of a run's log, as far as it can be read; the budget in hours, or in updates."""
    points = []
    try:
        for line in (folder / "log.jsonl").read_text().splitlines():
            if '"validation_loss"' in line:
                record = json.loads(line)
                spent = record["update"] if config["budget_steps"] else record["spent_seconds"] / 3600
                points.append([spent, record["validation_loss"]])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # the end of a log that was cut; the final loss is in result.json
    return points


def find_runs(paths):
    """The runs at these paths or below them."""
    folders = []
    for path in map(Path, paths):
        found = [path] if (path / "config.json").exists() else sorted(file.parent for file in path.rglob("config.json"))
        if not found:
            raise UserError(f"{path}: neither the folder of a run nor a folder with runs in it")
        folders += [folder for folder in found if folder not in folders]
    return [read(folder) for folder in folders]


# -- Statistics --------------------------------------------------------------------------------------------

# Student's t for a two-sided 95% interval, by degrees of freedom from 1; beyond the table the next smaller entry, which is safe.
T_95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086]  # fmt: skip


def t_95(degrees):
    return T_95[min(max(1, math.floor(degrees)), len(T_95)) - 1]


def difference(ours, baseline):
    """(mean, half the width of its 95% interval or None, how) of the difference between two experiments.

    Args:
        ours, baseline: {seed: [losses]}; several runs of a seed count as their mean.
    """
    ours, baseline = ({seed: statistics.mean(values) for seed, values in runs.items()} for runs in (ours, baseline))
    common = sorted(set(ours) & set(baseline))
    if common:
        differences = [ours[seed] - baseline[seed] for seed in common]
        half = t_95(len(common) - 1) * statistics.stdev(differences) / len(common) ** 0.5 if len(common) > 1 else None
        return statistics.mean(differences), half, f"paired, {len(common)}"
    mean = statistics.mean(ours.values()) - statistics.mean(baseline.values())
    if min(len(ours), len(baseline)) < 2:
        return mean, None, "unpaired"
    # Welch 1947: unequal variances.
    parts = [statistics.variance(runs.values()) / len(runs) for runs in (ours, baseline)]
    degrees = sum(parts) ** 2 / sum(part**2 / (len(runs) - 1) for part, runs in zip(parts, (ours, baseline))) if sum(parts) else 1
    return mean, t_95(degrees) * sum(parts) ** 0.5, "unpaired"


# -- Rows and groups -----------------------------------------------------------------------------------------


def budget_text(plan):
    return f"{plan['budget_steps']} updates" if plan["budget_steps"] else f"{plan['budget_hours']:g} h"


def settings_of(run):
    """Everything that a person can set and that decides the result, but not the group and the seed."""
    return {
        name: value for name, value in (run.config | run.config["options"]).items() if name not in {"options", *NOT_A_SETTING, *OF_A_GROUP}
    }  # fmt: skip


@dataclass
class Row:
    """One experiment: a method with its settings, in one group; `runs` are its finished ones."""

    label: str  # the method, and the settings that tell it from its other rows
    plan: dict  # the values of OF_A_GROUP
    family: str  # the group without its budget
    runs: list

    def losses(self):
        """{seed: [final validation losses]}"""
        found = collections.defaultdict(list)
        for run in self.runs:
            found[run.config["seed"]].append(run.result["validation_loss"])
        return found

    def mean_loss(self):
        """The mean over seeds; a seed that ran twice counts once."""
        return statistics.mean(statistics.mean(values) for values in self.losses().values())


def family_of(run):
    """What runs must agree in, but for the budget: (text for people, identity).

    Of a finished run the identity has the preparation of the corpus and the reference's own probe times; and the device
    where hours are plain time (--reference=this), which other machines' hours are not.
    """
    config, result = run.config, run.result
    text = f"{config['model']}-{config['size']} on {config['data']}"
    if config["train_on"] != "training":
        text += f", trained on the {config['train_on']}"
    probe_seconds = result.get("reference", {}).get("probe_seconds")
    plain_time = bool(config["budget_hours"]) and not probe_seconds
    return text, json.dumps([text, Path(config["reference"]).stem, result.get("corpus"), probe_seconds, plain_time and result.get("device")])


def rows_of(runs):
    """{group: [Row]}: the baseline first, then by mean loss; experiments without a finished run last. A group is a family and a
    budget; an unfinished run, of which corpus and reference are not on record, stands with the first family of its name."""
    texts, experiments = {}, collections.defaultdict(lambda: collections.defaultdict(list))
    for run in sorted((run for run in runs if run.config), key=lambda run: not run.result):
        text, identity = family_of(run)
        if not run.result:
            identity = next((other for other, known in texts.items() if known == text), identity)
        texts[identity] = text
        plan = {name: run.config[name] for name in OF_A_GROUP}
        experiments[identity, budget_text(plan), json.dumps(plan)][json.dumps(settings_of(run), sort_keys=True)].append(run)
    tables = {}
    for (identity, budget, plan), found in sorted(experiments.items(), key=lambda item: (texts[item[0][0]], list(texts).index(item[0][0]), len(item[0][1]), item[0][1])):
        plan, twins = json.loads(plan), [other for other, known in texts.items() if known == texts[identity]]
        family = texts[identity] + (f" ({twins.index(identity) + 1} of {len(twins)} corpora or references)" if len(twins) > 1 else "")
        settings, rows = [json.loads(text) for text in found], []
        for own, members in zip(settings, found.values()):
            others = [(sum(bool(run.result) for run in runs_of), other) for other, runs_of in zip(settings, found.values()) if other["method"] == own["method"]]
            plain = max(others, key=lambda pair: pair[0])[1]  # the one with the most runs goes by the method's name alone
            telling = [name for name in own if own[name] != plain.get(name)]
            label = " ".join([own["method"], *(f"{name}={own[name]}" for name in telling)])
            rows.append(Row(label, plan, f"{family}, {Path(plan['reference']).stem}", [run for run in members if run.result]))
        rows.sort(key=lambda row: (row.label != "baseline", not row.runs, row.mean_loss() if row.runs else 0.0))
        tables[f"{family}, {budget}{' of ' + Path(plan['reference']).stem if plan['budget_hours'] else ''}"] = rows
    return tables


# -- Downstream scores ---------------------------------------------------------------------------------------


def downstream(run):
    """({(folder, task, metric): {"last": [scores], "best": [scores]}}, problem) of what finetune.py left in a run's folder."""
    scores, problem = {}, ""
    for folder in sorted(path for path in (run.folder / "finetuned").glob("*") if path.is_dir()):
        try:
            for task, metrics in tasks.summary(folder, tasks.find(folder.name.removesuffix("-untrained"))).items():
                scores |= {(folder.name, task, metric): kinds for metric, kinds in metrics.items()}
        except UserError as error:
            problem = f"damaged: {error}"
    return scores, problem


# -- Tables --------------------------------------------------------------------------------------------------

COLUMNS = [
    "model", "size", "data", "reference", "budget", "method", "n", "validation_loss", "standard_deviation", "difference", "interval_95", "how",
    "speed_up", "updates", "rows", "charged_hours", "free_hours", "wall_hours", "cut_share",
]  # fmt: skip


def record_of(row, baseline, points):
    """A row of the table as {column: value}, None where it is missing. `points`: the baseline's (budget, final loss)."""
    losses, plan = row.losses(), row.plan
    means = [statistics.mean(values) for values in losses.values()]
    record = dict.fromkeys(COLUMNS) | {name: plan[name] for name in ("model", "size", "data", "reference")}
    record |= {"budget": budget_text(plan), "method": row.label, "n": len(means)}
    if not means:
        return record
    record |= {"validation_loss": statistics.mean(means), "standard_deviation": statistics.stdev(means) if len(means) > 1 else None}
    if baseline and baseline is not row and baseline.runs:
        record["difference"], record["interval_95"], record["how"] = difference(losses, baseline.losses())
    if row.plan["budget_hours"]:
        record["speed_up"] = speed_up(points, record["validation_loss"], row.plan["budget_hours"])
    for name, value in (
        ("updates", lambda result: result["updates"]), ("rows", lambda result: result["rows"]), ("charged_hours", lambda result: result["charged_seconds"] / 3600),
        ("free_hours", lambda result: result["free_seconds"] / 3600), ("wall_hours", lambda result: result["wall_seconds"] / 3600),
        ("cut_share", lambda result: result["cut_seconds"] / max(result["charged_seconds"], 1e-9)),
    ):  # fmt: skip
        record[name] = statistics.mean(value(run.result) for run in row.runs)
    return record


def speed_up(points, loss, hours):
    """The budget at which the baseline reaches this loss, over this budget: a number, "<x" or ">x" outside the baseline's
    budgets, None if it has fewer than two.

    Between two budgets the baseline's final loss is taken to be a line over the logarithm of the budget. Only runs to
    their end count: in the middle of a longer run the learning rate has not decayed yet.
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
        "| method | n | validation loss | difference to the baseline, 95% | speed-up | updates | rows | charged h | free h | wall h | cut |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        loss = f"{r['validation_loss']:.4f} ± {formatted(r['standard_deviation'], '.4f')}" if r["n"] else MISSING
        gap = MISSING
        if r["difference"] is not None:
            gap = f"{r['difference']:+.4f} ± {formatted(r['interval_95'], '.4f')} ({r['how']})"
        cells = [r["method"], r["n"], loss, gap, formatted(r["speed_up"], ".2f"), formatted(r["updates"], ",.0f"), formatted(r["rows"], ",.0f")]
        cells += [formatted(r[name], ".3g") for name in ("charged_hours", "free_hours", "wall_hours")] + [formatted(r["cut_share"], ".2%")]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def downstream_markdown(rows):
    """Scores after the last epoch (and the best one) by task, over all runs and fine-tuning seeds; "" if there are none."""
    found = {row.label: collections.defaultdict(lambda: {"last": [], "best": []}) for row in rows}
    for row in rows:
        for run in row.runs:
            for place, kinds in downstream(run)[0].items():
                for kind, scores in kinds.items():
                    found[row.label][place][kind] += scores
    places = sorted({place for scores in found.values() for place in scores})
    if not places:
        return ""
    lines = ["| method | " + " | ".join(" ".join(place) for place in places) + " |", "|---" * (len(places) + 1) + "|"]
    for label, scores in found.items():
        cells = [f"{tasks.percent(scores[place]['last'])}, best {tasks.percent(scores[place]['best'])}" if place in scores else MISSING for place in places]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


# -- Figures -------------------------------------------------------------------------------------------------


def draw(tables, families, folder):
    """Writes the figures; returns their paths."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("--figures needs one more package: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    paths = []

    def save(figure, name):
        path = folder / f"{name}.svg"
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
        pyplot.close(figure)
        paths.append(path)

    for name, rows in tables.items():
        figure, axes = pyplot.subplots(figsize=(7, 4.5))
        for row in rows:
            curves = [run.validations for run in row.runs if run.validations]
            if curves and len({len(curve) for curve in curves}) == 1:  # all were validated as often
                places = list(zip(*curves))
                spent = [statistics.mean(point[0] for point in place) for place in places]
                losses = [[point[1] for point in place] for place in places]
                (line,) = axes.plot(spent, list(map(statistics.mean, losses)), marker="o", markersize=3, label=f"{row.label} ({len(curves)})")
                axes.fill_between(spent, list(map(min, losses)), list(map(max, losses)), color=line.get_color(), alpha=0.2)
            else:
                for curve in curves:
                    axes.plot(*zip(*curve), marker="o", markersize=3, label=row.label)
        axes.set(title=name, ylabel="validation loss (nats); band: all seeds")
        axes.set_xlabel("updates" if rows[0].plan["budget_steps"] else f"hours of {Path(rows[0].plan['reference']).stem}")
        if axes.lines:
            axes.legend(fontsize=8)
            save(figure, "loss-" + file_name(name))
    for name, by_method in families.items():
        if max(len(points) for points in by_method.values()) < 2:
            continue
        figure, axes = pyplot.subplots(figsize=(7, 4.5))
        for label, points in by_method.items():
            axes.plot(*zip(*points), marker="o", label=label)
        axes.set(title=name, xscale="log", xlabel="budget, hours of the reference", ylabel="final validation loss (nats)")
        axes.legend(fontsize=8)
        save(figure, "budgets-" + file_name(name))
        baseline = by_method.get("baseline", [])
        figure, axes = pyplot.subplots(figsize=(7, 4.5))
        for label, points in by_method.items():
            speeds = [(hours, speed_up(baseline, loss, hours)) for hours, loss in points]
            if known := [point for point in speeds if isinstance(point[1], float)]:  # inside the baseline's budgets
                axes.plot(*zip(*known), marker="o", label=label)
        axes.axhline(1.0, color="black", linewidth=0.5)
        axes.set(title=name, xscale="log", xlabel="budget, hours of the reference", ylabel="baseline's budget for the same loss / budget")
        if len(axes.lines) > 1:
            axes.legend(fontsize=8)
            save(figure, "speed-up-" + file_name(name))
    return paths


def file_name(text):
    return re.sub(r"[^\w.]+", "-", text).strip("-")


# -- The command ---------------------------------------------------------------------------------------------


@exits_on_user_error
def main(arguments=None):
    parser = Parser(description=__doc__, prog="report.py")
    parser.add_argument("runs", nargs="+", help="folders of runs, or folders with runs in them")
    parser.add_argument("--csv", metavar="FILE", help="write the table there, too, with unrounded numbers")
    parser.add_argument("--figures", metavar="FOLDER", help="draw figures into it (SVG)")
    options = parser.parse_args(arguments)
    runs = find_runs(options.runs)
    tables = rows_of(runs)
    families, records = collections.defaultdict(dict), []
    for rows in tables.values():
        for row in rows:
            if row.runs and row.plan["budget_hours"]:
                families[row.family].setdefault(row.label, []).append((row.plan["budget_hours"], row.mean_loss()))
    for by_method in families.values():
        for points in by_method.values():
            points.sort()
    for name, rows in tables.items():
        baseline = next((row for row in rows if row.label == "baseline"), None)
        here = [record_of(row, baseline, families.get(row.family, {}).get("baseline", [])) for row in rows]
        records += here
        print(f"## {name}\n\n{markdown(here)}\n")
        if scores := downstream_markdown(rows):
            print(f"Fine-tuned, in percent, mean ± standard deviation (n):\n\n{scores}\n")
        finished = [run.result for row in rows for run in row.runs]
        for title, what in (("commits", "commit"), ("devices", "device"), ("threads", "threads")):
            print(f"{title}: {', '.join(sorted({str(result.get(what) or MISSING) for result in finished})) or MISSING}")
        print()
    problems = [(run.folder, run.problem or downstream(run)[1]) for run in runs]
    for folder, problem in problems:
        if problem:
            print(f"{folder}: {problem}")
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(records)
        print(f"written: {options.csv}")
    if options.figures:
        for path in draw(tables, families, Path(options.figures)):
            print(f"drawn: {path}")


if __name__ == "__main__":
    main()
