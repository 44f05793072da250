"""Binds a block's weights only while its forward runs, as the engine does; elsewhere they are on meta."""

from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def only_while_running(model, names):
    """Take the weights of the named blocks away between their forwards; yields the list of visits."""
    visits, hooks = [], []
    for name in names:
        block = model.get_submodule(name)
        slots = [
            (module, key, parameter)
            for module in block.modules()
            for key, parameter in module._parameters.items()
            if parameter is not None
        ]
        release = _setter([(m, k, nn.Parameter(p.to("meta"), p.requires_grad)) for m, k, p in slots])
        bind = _setter(slots, visits, name)
        hooks += [
            block.register_forward_pre_hook(bind),
            block.register_forward_hook(release, always_call=True),
        ]
        release()
    try:
        with torch.no_grad():
            yield visits
    finally:
        for hook in hooks:
            hook.remove()


def _setter(slots, visits=None, name=None):
    def apply(*_):
        for module, key, parameter in slots:
            module._parameters[key] = parameter
        if visits is not None:
            visits.append(name)

    return apply
