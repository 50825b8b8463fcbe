"""Checks whether fast paths may use weights directly, without calling the modules that hold them."""

from collections.abc import Sequence

from torch import nn


def is_plain(module: nn.Module) -> bool:
    """Return whether a linear layer is neither quantized, nor wrapped by an adapter, nor offloaded."""
    if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter or hasattr(module, "_hf_hook"):
        return False
    return module.bias is not None and not module.weight.is_meta


class WeightAddresses:
    """The memory of some modules' weights. It changes when weights are replaced or moved, but not by updates in place.

    The check runs before every pass, so it reads the dictionaries of the modules directly.
    """

    def __init__(self, root: nn.Module, names: Sequence[str]):
        """
        Args:
            names: submodules of `root`.
        """
        self._modules, self._weights = [], []
        for name in names:
            path, _, last = name.rpartition(".")
            module = root.get_submodule(name)
            self._modules.append((root.get_submodule(path)._modules, last, module))
            for key, weight in module.named_parameters(recurse=False):
                self._weights.append((module._parameters, key, weight.data_ptr()))

    def are_current(self) -> bool:
        """Return whether all modules and the memory of their weights are the same as before."""
        for submodules, name, module in self._modules:
            if submodules[name] is not module:
                return False
        return all(parameters[key].data_ptr() == address for parameters, key, address in self._weights)  # type: ignore[union-attr]
