"""Architecture search: cells behind one signature, and spaces of networks made of them."""
from .cells import ACTIVATIONS, CELLS, Attention, Cell, OnTokens, Residual, Shift, cell, cell_options, diagram, make_cell
from .space import ORIGINAL, Arch, Option, Parts, Position, SearchSpace, assemble, choices, chop, default_options, default_space, module_hash

__all__ = ["ACTIVATIONS", "CELLS", "ORIGINAL", "Arch", "Attention", "Cell", "OnTokens", "Option", "Parts", "Position", "Residual", "SearchSpace", "Shift", "assemble", "cell", "cell_options",
           "choices", "chop", "default_options", "default_space", "diagram", "make_cell", "module_hash"]
