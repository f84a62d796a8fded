"""Finds methods by the name of their file, and combines them with "+".

    find("stacking+lion")  ->  a `Combination`; call it like a Method class to get one that is running

There is no registry: `methods/NAME.py` with one subclass of `Method` in it is method NAME.
"""

import importlib
import inspect
import math
import pkgutil

import numpy as np
import torch

from errors import UserError

from .baseline import Method

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
        classes[name] = found[0]
    return Combination(classes)


class Combination:
    """One method or several, each place served by the one that claims it, or by the baseline.

    As a class would, it answers `options`, `defaults(model, size)`, `prerequisites(config)`; `start(...)`
    makes the running method.
    """

    def __init__(self, classes):
        self.classes = classes
        self.name = "+".join(classes)
        self.owner = {}
        for place, what in PLACES.items():
            claiming = [name for name, cls in classes.items() if getattr(cls, place) is not getattr(Method, place)]
            if len(claiming) > 1:
                raise UserError(f"--method={self.name}: {' and '.join(claiming)} both {what} ({place}); take one of them")
            self.owner[place] = claiming[0] if claiming else None
        self.options = {}
        for name, cls in classes.items():
            for flag, option in cls.options.items():
                if self.options.setdefault(flag, option) != option:
                    raise UserError(f"--method={self.name}: two methods mean different things by --{flag}; take one of them")

    def defaults(self, model, size):
        """Values of flags: the baseline's, over them each method's, the optimizer's last."""
        order = sorted(self.classes, key=lambda name: name == self.owner["optimizer"])
        declared = [self.classes[name].defaults for name in order]
        merged = {}
        for defaults in [Method.defaults, *(own for own in declared if own is not Method.defaults)]:
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
        return self.serve("evaluation_weights")

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
        return {name: plain(part.state_dict(), name, "state_dict", torch.Tensor) for name, part in self.parts.items()}

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
