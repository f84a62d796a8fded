"""Finds methods by the name of their file, and combines them with "+".

    find("stacking+lion")  ->  a `Combination`; call it like a Method class to get one that is running

There is no registry: `methods/NAME.py` with one subclass of `Method` in it is method NAME.
"""

import difflib
import importlib
import inspect
import math
import pkgutil

import numpy as np
import torch

from errors import UserError

from .baseline import Method, Option

# Places that one method serves; two that override the same one cannot be combined.
PLACES = {
    "optimizer": "update the weights",
    "active_layers": "choose the layers that train",
    "evaluation_layers": "choose the layers that the model has",
    "evaluation_weights": "choose the weights that are evaluated",
    "next_batch": "choose the rows",
}


def names():
    """All methods there are: the files of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(method):
    """The methods of a "+"-separated list, checked to fit together: a `Combination`."""
    classes = {}
    for name in method.split("+"):
        if name not in names():
            raise UserError(f"--method={method}: no method {name!r}; there are {', '.join(names())}")
        if name in classes:
            raise UserError(f"--method={method}: {name} stands there twice")
        module = importlib.import_module(f"{__name__}.{name}")
        found = [
            value for _, value in inspect.getmembers(module, inspect.isclass)
            if issubclass(value, Method) and value.__module__ == module.__name__
        ]  # fmt: skip
        if len(found) != 1:
            raise UserError(f"methods/{name}.py: expected one subclass of Method in it, found {len(found)}")
        check_declarations(name, found[0])
        classes[name] = found[0]
    return Combination(classes)


def check_declarations(name, cls):
    """Refuses what a method's class says that would otherwise be overlooked, or fail only later."""

    def expect(holds, message):
        if not holds:
            raise UserError(f"methods/{name}.py: {message}")

    for own in set(vars(cls)) - set(dir(Method)):
        meant = difflib.get_close_matches(own, [place for place in dir(Method) if not place.startswith("_")], 1, cutoff=0.85)
        expect(not meant, f"{own} is no place of a method; is {' or '.join(meant)} meant? If not, choose another name")
    one, other = (getattr(cls, place) is not getattr(Method, place) for place in ("state_dict", "load_state_dict"))
    expect(one == other, "state_dict and load_state_dict belong together; a resumed run needs both")
    for flag, option in cls.options.items():
        expect(flag.isidentifier() and isinstance(option, Option), f"options: {flag!r} is not the name of a flag with an Option")
        expect(isinstance(option.default, (bool, int, float, str)), f"options: the default of {flag} is {option.default!r}; expected a bool, int, float or string")
        expect(not option.choices or option.default in option.choices, f"options: the default of {flag} is {option.default!r}, which is none of its choices {option.choices}")
    for model, sizes in cls.defaults.items():
        expect(model in Method.defaults, f"defaults: {model!r} is no model; there are {', '.join(Method.defaults)}")
        expect(isinstance(sizes, dict) and set(sizes) <= set(Method.defaults[model]), f"defaults: of {model} expected {{size: {{flag: value}}}}, sizes {', '.join(Method.defaults[model])}")


class Combination:
    """One method or several, each place served by the one that claims it, or by the baseline.

    As a class would, it answers `options`, `defaults(model, size)`, `prerequisites(config)`; `start(...)`
    makes the running method.
    """

    def __init__(self, classes):
        self.name = "+".join(classes)
        self.owner = {}
        for place, what in PLACES.items():
            claiming = [name for name, cls in classes.items() if getattr(cls, place) is not getattr(Method, place)]
            if len(claiming) > 1:
                raise UserError(f"--method={self.name}: {' and '.join(claiming)} both {what} ({place}); take one of them")
            self.owner[place] = claiming[0] if claiming else None
        # The optimizer's comes last: its defaults win, and its after_step finds what the others' left.
        self.classes = dict(sorted(classes.items(), key=lambda item: item[0] == self.owner["optimizer"]))
        self.options = {}
        for name, cls in self.classes.items():
            for flag, option in cls.options.items():
                if self.options.setdefault(flag, option) != option:
                    raise UserError(f"--method={self.name}: two methods mean different things by --{flag}; take one of them")

    def defaults(self, model, size):
        """Values of flags: the baseline's, over them each method's, the optimizer's last."""
        merged = {}
        for defaults in [Method.defaults, *(cls.defaults for cls in self.classes.values() if cls.defaults is not Method.defaults)]:
            of_model = defaults.get(model, {})
            merged |= of_model.get("base", {}) | of_model.get(size, {})
        return merged

    def prerequisites(self, config):
        runs = {}
        for cls in self.classes.values():
            runs |= cls.prerequisites(config)
        return runs

    def draws_per_update(self, config):
        owner = self.owner["active_layers"]
        rows = self.classes[owner].rows_per_draw.get(config.model) if owner else None
        return math.ceil(config.batch / rows) if rows else 1

    def start(self, *arguments):
        return Running(self, *arguments)


class Running:
    """A started combination: what the training loop talks to. It checks what a place returns, so that a mistake in
    a method file is named with that file."""

    def __init__(self, combination, model, corpus, clock, config, prerequisites):
        arguments = (model, corpus, clock, config, prerequisites)
        self.parts = {name: cls(*arguments) for name, cls in combination.classes.items()}
        self.baseline, self.owner = Method(*arguments), combination.owner
        self.draws_per_update = combination.draws_per_update(config)
        self.owns_optimizer = self.owner["optimizer"] is not None
        self.all_layers = range(len(model.layers))

    def serve(self, place, *arguments):
        return getattr(self.parts.get(self.owner[place], self.baseline), place)(*arguments)

    def expect(self, holds, place, returned, expected):
        if not holds:
            raise UserError(f"methods/{self.owner[place]}.py: {place}() returned {returned!r:.100}; expected {expected}")
        return returned

    def optimizer(self):
        optimizer = self.serve("optimizer")
        self.expect(isinstance(optimizer, torch.optim.Optimizer), "optimizer", optimizer, "a torch.optim.Optimizer")
        for part in self.parts.values():
            part.shared_optimizer = optimizer
        return optimizer

    def active_layers(self, draw):
        # Without a claimant all layers that the model has are active, whoever decides which those are.
        if not self.owner["active_layers"]:
            return self.evaluation_layers()
        return self.checked_layers("active_layers", self.serve("active_layers", draw))

    def evaluation_layers(self):
        return self.checked_layers("evaluation_layers", self.serve("evaluation_layers"))

    def checked_layers(self, place, layers):
        holds = isinstance(layers, list) and all(layer in self.all_layers for layer in layers)
        return self.expect(holds, place, layers, f"a list of layers from 0 to {self.all_layers[-1]}")

    def evaluation_weights(self):
        weights = self.serve("evaluation_weights")
        holds = isinstance(weights, dict) and all(
            isinstance(parameter, torch.nn.Parameter) and isinstance(value, torch.Tensor) and value.shape == parameter.shape
            for parameter, value in weights.items()
        )  # fmt: skip
        return self.expect(holds, "evaluation_weights", weights, "a dictionary: the model's parameters and tensors of their shapes")

    def next_batch(self):
        positions = self.serve("next_batch")
        holds = isinstance(positions, np.ndarray) and positions.ndim == 1 and len(positions) and positions.dtype.kind == "i"
        return self.expect(holds, "next_batch", positions, "an array of stream positions, at least one")

    def report(self):
        """{method: {name: number}} of those that have something to say."""
        reports = {name: plain(part.report(), name, "report") for name, part in self.parts.items()}
        return {name: report for name, report in reports.items() if report}

    def after_step(self):
        for part in self.parts.values():
            part.after_step()

    def state_dict(self):
        states = {name: plain(part.state_dict(), name, "state_dict", torch.Tensor) for name, part in self.parts.items()}
        for name, state in states.items():
            if not isinstance(state, dict):
                raise UserError(f"methods/{name}.py: state_dict() returned {state!r:.100}; expected a dictionary")
        return states

    def load_state_dict(self, state):
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def plain(value, name, place, *also):
    """What a method returned, for a file: NumPy's numbers become Python's; what no file can hold is refused
    here, not when it is read again."""
    if isinstance(value, dict):
        return {key: plain(part, name, place, *also) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part, name, place, *also) for part in value]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str, *also)):
        return value
    tensors = "tensors, " if also else ""
    raise UserError(f"methods/{name}.py: {place}() has a {type(value).__name__} in it; it may hold {tensors}numbers, strings, lists and dictionaries (of an array: .tolist())")
