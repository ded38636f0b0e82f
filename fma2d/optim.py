"""Groups of parameters for optimizers."""

from timm.optim import param_groups_weight_decay
from torch import nn

from .checks import check_number
from .modules import _FMA


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Groups for an optimizer of `torch.optim`: weight decay on what is decayed as a rule, none on the rest.

    None is on aggregation kernels, which are densities around 1, on norms and biases, and on what the model or a
    part of it names in a method `no_weight_decay`, as timm's models do.

    Args:
        model: any model, with the attention layers of fma2d anywhere in it.
        weight_decay: the decay of the other parameters, at least 0.

    Returns:
        Dicts of `params` and `weight_decay`. What has `requires_grad=False` is in none.

    Raises:
        TypeError, ValueError: for a model that is no module, a weight decay that is no number or below 0.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    check_number("weight_decay", weight_decay, 0)
    spared = set()
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, _FMA):
            spared |= {f"{prefix}kernels", f"{prefix}parametrizations.kernels.*"}
        if callable(listed := getattr(module, "no_weight_decay", None)):
            spared |= {prefix + own for own in listed()}
    return param_groups_weight_decay(model, weight_decay, no_weight_decay_list=spared)
