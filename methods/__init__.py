"""Finds methods by the name of their file, and combines them with "+".

    find("stacking+lion")  ->  a `Combination`; `start` makes its methods

There is no registry: `methods/NAME.py` with one subclass of `Method` in it is method NAME.
"""

import hashlib
import importlib
import inspect
import pkgutil
from pathlib import Path

from errors import UserError

from .baseline import Method

# Hooks that one method serves: two that override the same one cannot be combined.
HOOKS = {
    "optimizer": "update the weights",
    "schedule": "set the learning rate",
    "layers": "choose the layers that the model has",
    "next_batch": "choose the rows",
    "groups": "choose the layers that train",
    "inputs": "choose what is read of a row",
    "loss": "define the loss",
    "before_step": "change the gradients",
    "evaluation_weights": "choose the weights that are evaluated",
}


def names():
    """All methods there are: the files of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(method):
    """The methods of a "+"-separated list: a `Combination`."""
    classes = {}
    for name in method.split("+"):
        if name not in names():
            raise UserError(
                f"--method={method}: no method {name!r}; there are {', '.join(names())}"
            )
        if name in classes:
            raise UserError(f"--method={method}: {name} is listed twice")
        module = importlib.import_module(f"{__name__}.{name}")
        own = [value for value in vars(module).values() if inspect.isclass(value)]
        own = [cls for cls in own if issubclass(cls, Method) and cls.__module__ == module.__name__]
        if len(own) != 1:
            raise UserError(f"methods/{name}.py: expected one subclass of Method, found {len(own)}")
        classes[name] = own[0]
    return Combination(classes)


class Combination:
    """One method or several.

    Before `start` it answers for the classes: `options`, `defaults`, `prerequisites`. Once
    started it has every hook of `HOOKS` as an attribute, that of the method that overrides it, or
    else the baseline's.
    """

    def __init__(self, classes):
        self.name, self.owner = "+".join(classes), {}
        for hook, what in HOOKS.items():
            default = getattr(Method, hook)
            owners = [name for name, cls in classes.items() if getattr(cls, hook) is not default]
            if len(owners) > 1:
                both = f"{' and '.join(owners)} both {what} ({hook})"
                choice = "choose one of them, or write one method that does both"
                raise UserError(f"--method={self.name}: {both}; {choice}")
            self.owner[hook] = owners[0] if owners else None
        # The optimizer's comes last: its defaults win, and its after_step runs after the others'.
        order = sorted(classes, key=lambda name: name == self.owner["optimizer"])
        self.classes = {name: classes[name] for name in order}
        self.options = {}
        for cls in self.classes.values():
            for flag, option in cls.options.items():
                if self.options.setdefault(flag, option) != option:
                    raise UserError(f"--method={self.name}: it has two options --{flag}")

    def defaults(self, model, size, typed=()):
        """Values of flags: the baseline's, over them the methods', over all the optimizer's. Two of
        the others that disagree raise a UserError, unless the flag was typed."""

        def of(cls):
            of_model = cls.defaults.get(model, {})
            return of_model.get("base", {}) | of_model.get(size, {})

        values, set_by = of(Method), {}
        for name, cls in self.classes.items():
            if cls.defaults is Method.defaults:
                continue
            for flag, value in of(cls).items():
                other, is_last = set_by.get(flag), name == self.owner["optimizer"]
                if other and value != values[flag] and not is_last and flag not in typed:
                    both = f"{other} has {values[flag]} and {name} {value}"
                    raise UserError(f"--method={self.name}: {both} as --{flag}; type --{flag}")
                values[flag], set_by[flag] = value, name
        return values

    def trains_in(self, dtype):
        return all(dtype in cls.dtypes for cls in self.classes.values())

    def prerequisites(self, config):
        runs = {}
        for cls in self.classes.values():
            for name, run in cls.prerequisites(config).items():
                if runs.setdefault(name, run) != run:
                    raise UserError(f"--method={self.name}: two of its methods call a run {name}")
        return runs

    def source_hashes(self):
        """{method: hash of its file}, and of the methods that they inherit from: two versions of a
        method can be told apart afterwards."""
        classes = {base for cls in self.classes.values() for base in inspect.getmro(cls)}
        files = sorted(Path(inspect.getfile(cls)) for cls in classes if issubclass(cls, Method))
        return {file.stem: hashlib.sha256(file.read_bytes()).hexdigest()[:12] for file in files}

    def start(self, *arguments):
        """Makes the methods (`arguments` are `Method`'s) and the optimizer; returns itself."""
        self.methods = {name: cls(*arguments) for name, cls in self.classes.items()}
        baseline = Method(*arguments)
        for method in (baseline, *self.methods.values()):
            method.combination = self
        for hook, owner in self.owner.items():
            setattr(self, hook, getattr(self.methods.get(owner, baseline), hook))
        self.optimizer_in_use = self.optimizer()
        for group in self.optimizer_in_use.param_groups:
            group["peak_lr"] = group["lr"]  # the loop sets "lr" to its scheduled share
        return self

    def warm_up(self):
        for method in self.methods.values():
            method.warm_up()

    def begin_update(self):
        for method in self.methods.values():
            method.begin_update()

    def after_step(self):
        for method in self.methods.values():
            method.after_step()

    def report(self):
        """{method: {name: number}} of those that have something to say."""
        reports = {name: method.report() for name, method in self.methods.items()}
        return {name: report for name, report in reports.items() if report}

    def state_dict(self):
        return {name: method.state_dict() for name, method in self.methods.items()}

    def load_state_dict(self, state):
        for name, method in self.methods.items():
            method.load_state_dict(state[name])
