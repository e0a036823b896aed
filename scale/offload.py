"""The resting player's moments in CPU memory: --offload-resting.

8 bytes a parameter leave the GPU while the other player trains. They move when the turn changes,
before the first optimiser step of the player whose turn it is.
"""

import functools

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor


def take_turns(players):
    """From now on at most one of the players' optimisers has its moments on the device."""
    optimizers = [player.optimizer for player in players.values()]
    refuse_cpu(players["protagonist"].model.device)

    def before_step(optimizer, *_):
        for other in optimizers:
            if other is not optimizer:
                rest(other)
        for parameter, state in optimizer.state.items():
            for name in MOMENTS:
                state[name] = moved(state[name], parameter.device, parameter)

    for optimizer in optimizers:
        optimizer.register_step_pre_hook(before_step)
        optimizer.register_load_state_dict_post_hook(rest)


def refuse_cpu(device):
    if device.type == "cpu":
        raise ValueError("--offload-resting needs a GPU: here all is in CPU memory already")


def rest(optimizer):
    for state in optimizer.state.values():
        for name in MOMENTS:
            state[name] = moved(state[name], torch.device("cpu"))


def moved(value, device, parameter=None):
    """A moment on a device; of shards, on the parameter's mesh, or on one of CPUs without it."""
    if value.device == device:
        return value
    if not isinstance(value, DTensor):
        return value.to(device)
    mesh = cpus(value.device_mesh.shape) if parameter is None else parameter.device_mesh
    return DTensor.from_local(value.to_local().to(device), mesh, value.placements,
                              shape=value.shape, stride=value.stride())


@functools.cache
def cpus(shape):
    return init_device_mesh("cpu", shape)


MOMENTS = "exp_avg", "exp_avg_sq"
