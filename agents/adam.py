"""Adam (Kingma and Ba, arXiv 1412.6980) without torch.compile."""

import inspect

import torch


class Adam(torch.optim.Adam):
    """torch's, bit for bit, as it is beneath the guards that keep torch.compile out.

    A guard imports the compiler to tell it so: 1.3 s of a control agent's start on a CPU, 3.3 s on a machine with a
    GPU. Nothing here is ever compiled.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))
